// How the Python side passes tensors to both modules: addresses, and tuples of four integers.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "heads.h"
#include "rows.h"

namespace internvl {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Rows (address, inner, outer stride, inner stride), heads (address, batch stride, head stride, token
// stride), or an extent (batch, heads, tokens, dim).
struct Four {
  int64_t values[4];

  explicit Four(const pybind11::tuple& from) {
    if (from.size() != 4) throw std::invalid_argument("expected four integers");
    for (int i = 0; i < 4; ++i) {
      values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(from.ptr(), i));
      if (values[i] == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    }
  }

  template <typename T>
  Rows<T> rows() const {
    return {at<T>(values[0]), values[1], values[2], values[3]};
  }
  template <typename T>
  Heads<T> heads() const {
    return {at<T>(values[0]), values[1], values[2], values[3]};
  }
  Extent extent() const { return {values[0], values[1], values[2], values[3]}; }
};

}  // namespace internvl
