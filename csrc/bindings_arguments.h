// How the Python side passes tensors to both modules: addresses, and tuples of four integers.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "heads.h"
#include "rows.h"

namespace internvl {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A tuple of COUNT integers.
template <int COUNT>
struct Numbers {
  int64_t values[COUNT];

  explicit Numbers(const pybind11::tuple& from) {
    if (from.size() != COUNT)
      throw std::invalid_argument("expected " + std::to_string(COUNT) + " integers");
    for (int i = 0; i < COUNT; ++i) {
      values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(from.ptr(), i));
      if (values[i] == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    }
  }
  int64_t operator[](int i) const { return values[i]; }
};

// Rows (address, inner, outer stride, inner stride), heads (address, batch stride, head stride, token
// stride), or an extent (batch, heads, tokens, dim).
struct Four : Numbers<4> {
  using Numbers<4>::Numbers;

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
