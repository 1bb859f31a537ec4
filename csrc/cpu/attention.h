// Softmax attention on the CPU, QK norms folded in. What it computes: kernels/attention.py,
// qk_norm_attention.py.
//
// A task is one key head of one image, or some of the query rows that read it. It packs K by panels of
// keys and V by panels of channels, in which the steps are keys (tiles.h), so that both stay in L2, and
// then takes kTileRows queries at a time: scores in fp32, their softmax along whole rows, probabilities
// packed as the left side of the second product. Nothing of S x T ever reaches memory and no score is
// rounded.
//
// With norms, q is multiplied by both weights and its statistic when it is packed; the statistic of a key
// is a factor of its column of scores; K is packed as it lies.
#pragma once

#include <omp.h>

#include <cmath>

#include "attention_call.h"
#include "norm.h"
#include "tiles.h"

namespace internvl::ISA {

constexpr float kNever = -__builtin_inff();
constexpr float kLn2 = 0.69314718056f;  // scores are powers of two inside, of e outside

// What one thread writes between the two products, in this order in its share of the workspace.
template <typename T>
struct AttentionScratch {
  using Word = typename Step<T>::Word;
  static constexpr int64_t kDepth = Step<T>::kDepth;

  int64_t panels, steps, value_steps;  // of keys; of channels; of keys as steps
  Word *k, *v;                         // (panels, steps, kPanel); (dim / kPanel, value_steps, kPanel)
  uint32_t *q, *p;                     // (steps, rows); (keys of a tile as steps, rows)
  float *scores, *sums;                // (panels, rows, kPanel); (rows, kPanel)
  float *factor, *bias;                // of each key's scores; (panels * kPanel)
  T* row;  // (kTileRows, dim) normed queries, then (kTileRows, panels * kPanel) probabilities

  // Lays the parts out from `base` on; with base null, only `bytes` means something.
  int64_t bytes = 0;
  AttentionScratch(const AttentionCall<T>& call, char* base) {
    panels = parts_of(call.keys, kPanel);
    steps = parts_of(call.dim, kDepth);
    value_steps = parts_of(call.keys, kDepth);
    const auto take = [&](auto*& part, int64_t count) {
      part = reinterpret_cast<decltype(+part)>(base + bytes);
      bytes += parts_of(count * sizeof(*part), 64) * 64;
    };
    take(k, panels * steps * kPanel);
    take(v, parts_of(call.dim, kPanel) * value_steps * kPanel);
    take(q, steps * kTileRows);
    take(p, panels * kPanel / kDepth * kTileRows);
    take(scores, panels * kTileRows * kPanel);
    take(sums, kTileRows * kPanel);
    take(factor, panels * kPanel);
    take(bias, panels * kPanel);
    take(row, kTileRows * (call.dim > panels * kPanel ? call.dim : panels * kPanel));
  }
};

// Packs rows of values, `stride` apart, as steps of panels of channels.
template <typename T>
void pack_values(const T* from, int64_t stride, int64_t keys, int64_t dim, int64_t value_steps,
                 typename Step<T>::Word* to) {
  for (int64_t first = 0; first < dim; first += kPanel) {
    const int64_t channels = smaller(kPanel, dim - first);
    if (channels < kPanel)
      std::memset(static_cast<void*>(to), 0, value_steps * kPanel * sizeof(*to));
    for (int64_t step = 0; step < value_steps; ++step, to += kPanel) {
      const int64_t key = step * Step<T>::kDepth;
      const T* row = from + key * stride + first;
      if constexpr (Step<T>::kDepth == 1)
        std::memcpy(to, row, channels * sizeof(T));
      else
        for_each_vec(channels, [&](int64_t c, auto count) {
          const Vec next = key + 1 < keys ? load(row + stride + c, count) : Vec{};
          // Two bf16 in a word; the low half of a bf16 that was widened is 0.
          const Bits words = (Bits)next | (Bits)load(row + c, count) >> 16;
          store((Vec)words, reinterpret_cast<float*>(to + c), count);
        });
    }
  }
}

// The keys [start, end) that a query sees, `row` being its position among the keys.
struct Interval {
  int64_t start, end;
};

// From the first key that a row of a mask shows to the last one.
inline Interval shown_by(const uint8_t* seen, int64_t keys) {
  int64_t start = 0, end = keys;
  const auto none = [&](int64_t key) {
    uint64_t eight;
    std::memcpy(&eight, seen + key, sizeof eight);
    return eight == 0;
  };
  while (start + 8 <= keys && none(start)) start += 8;
  while (start < keys && !seen[start]) ++start;
  while (end >= start + 8 && none(end - 8)) end -= 8;
  while (end > start && !seen[end - 1]) --end;
  return start < end ? Interval{start, end} : Interval{0, 0};
}

template <typename T>
Interval seen_by(const AttentionCall<T>& call, int64_t row) {
  const int64_t prefix = smaller(call.prefix, call.keys);
  switch (call.mask) {
    case Mask::causal:
      return {0, row + 1};
    case Mask::prefix:
      return {0, row < prefix ? prefix : row + 1};
    case Mask::block:
      return row < prefix ? Interval{0, prefix} : Interval{prefix, row + 1};
    default:
      return {0, call.keys};
  }
}

// Rows of a tile: scores and probabilities of panels [first, end), and what the softmax leaves.
struct TileRows {
  int64_t rows, first, end;
  Interval seen[kTileRows];
  float top[kTileRows], total[kTileRows];  // the largest score and the sum of the exponentials
};

// What the rows of a tile see, queries [first, first + rows) of one head, and the panels of all that.
template <typename T>
TileRows rows_of_tile(const AttentionCall<T>& call, int64_t batch, int64_t head, int64_t first,
                      int64_t rows) {
  TileRows tile{rows, 0, 0, {}, {}, {}};
  int64_t start = call.keys, end = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const Interval seen = call.seen.data ? shown_by(call.seen.at(batch, head, first + r), call.keys)
                                         : seen_by(call, call.keys - call.queries + first + r);
    tile.seen[r] = seen;
    if (seen.start == seen.end) continue;
    start = smaller(start, seen.start);
    end = seen.end > end ? seen.end : end;
  }
  if (start < end) tile.first = start / kPanel, tile.end = parts_of(end, kPanel);
  return tile;
}

inline float largest(Vec v) {
  float lanes[kWidth], top = kNever;
  std::memcpy(lanes, &v, sizeof lanes);
  for (float lane : lanes) top = lane > top ? lane : top;
  return top;
}

inline float sum_of(Vec v) {
  Sum sum;
  sum.chains[0] = v;
  return static_cast<float>(sum.total());
}

// Hides what row r of a mask hides, in its scaled scores.
template <typename T>
void hide(const AttentionScratch<T>& s, const TileRows& tile, int64_t r, const uint8_t* seen) {
  for (int64_t key = tile.seen[r].start; key < tile.seen[r].end; ++key) {
    uint64_t eight;  // which are mostly all shown: bytes of 1
    if (key + 8 <= tile.seen[r].end) {
      std::memcpy(&eight, seen + key, sizeof eight);
      if (eight == 0x0101010101010101u) {
        key += 7;
        continue;
      }
    }
    if (!seen[key]) s.scores[(key / kPanel * tile.rows + r) * kPanel + key % kPanel] = kNever;
  }
}

// Scales and masks the scores of row r in place; returns the largest.
template <typename T>
float mask_row(const AttentionScratch<T>& s, const TileRows& tile, int64_t r) {
  const Interval seen = tile.seen[r];
  Vec top = Vec{} + kNever;
  IntVec lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  for (int64_t panel = tile.first; panel < tile.end; ++panel)
    for (int64_t key = panel * kPanel; key < (panel + 1) * kPanel; key += kWidth) {
      float* at = s.scores + (panel * tile.rows + r) * kPanel + key % kPanel;
      Vec score = load(at) * load(s.factor + key) + load(s.bias + key);
      if (key < seen.start || key + kWidth > seen.end) {
        const IntVec index = lane + static_cast<int32_t>(key);
        const IntVec inside = (index >= static_cast<int32_t>(seen.start)) &
                              (index < static_cast<int32_t>(seen.end));
        score = inside ? score : Vec{} + kNever;
      }
      store(score, at);
      top = score > top ? score : top;
    }
  return largest(top);
}

// Whether every row sees every key and all scores have one factor.
template <typename T>
bool is_plain(const AttentionCall<T>& call) {
  return call.mask == Mask::full && !call.seen.data && !call.key_padding_mask && !call.q_weight;
}

// The largest score of row r where the call is plain: they stay as they are, but for keys that are not
// there.
template <typename T>
float largest_of_row(const AttentionCall<T>& call, const AttentionScratch<T>& s, const TileRows& tile,
                     int64_t r) {
  float* row = s.scores + r * kPanel;
  for (int64_t key = call.keys; key < tile.end * kPanel; ++key)
    row[(tile.end - 1) * tile.rows * kPanel + key % kPanel] = kNever;
  Vec top = Vec{} + kNever, other = top;
  for (int64_t panel = 0; panel < tile.end; ++panel) {
    const Vec one = load(row + panel * tile.rows * kPanel);
    const Vec two = load(row + panel * tile.rows * kPanel + kWidth);
    top = one > top ? one : top;
    other = two > other ? two : other;
  }
  return largest(top > other ? top : other);
}

// Powers of two of `factor` times the scores of row r less the largest; returns their sum.
template <typename T>
float exponentials(const AttentionScratch<T>& s, const TileRows& tile, int64_t r, float factor) {
  const float top = tile.top[r] == kNever ? 0.0f : tile.top[r];
  T* to = s.row + r * s.panels * kPanel;
  Vec total = {}, other = {};
  for (int64_t panel = tile.first; panel < tile.end; ++panel) {
    const float* from = s.scores + (panel * tile.rows + r) * kPanel;
    // Multiplied last: the largest gives 1 exactly.
    const Vec one = exp2_for<T>((load(from) - top) * factor);
    const Vec two = exp2_for<T>((load(from + kWidth) - top) * factor);
    store(one, to + panel * kPanel);
    store(two, to + panel * kPanel + kWidth);
    total += one;
    other += two;
  }
  return sum_of(total + other);
}

// Packs queries [first, first + rows) of one head; with norms, folded.
template <typename T>
void pack_queries(const AttentionCall<T>& call, const AttentionScratch<T>& s, int64_t batch,
                  int64_t head, int64_t first, int64_t rows) {
  const T* q = call.q.at(batch, head, first);
  if (!call.q_weight)
    return pack_tile(Rows<const T>{q, rows, 0, call.q.token_stride}, 0, rows, call.dim, s.q);
  const T *q_weight = call.q_weight + head * call.dim, *k_weight = call.k_weight + head * call.dim;
  for (int64_t r = 0; r < rows; ++r) {
    const float rstd = call.rstd[batch * call.queries + first + r];
    for_each_vec(call.dim, [&](int64_t c, auto count) {
      const Vec weight = load(q_weight + c, count) * load(k_weight + c, count);
      const Vec folded = load(q + r * call.q.token_stride + c, count) * rstd * weight;
      store(folded, s.row + r * call.dim + c, count);
    });
  }
  pack_tile(Rows<const T>{s.row, rows, 0, call.dim}, 0, rows, call.dim, s.q);
}

// Writes row i of the output: the mean of all values, for a query that sees nothing.
template <typename T>
void write_mean(const AttentionCall<T>& call, int64_t image, int64_t batch, int64_t head, int64_t i) {
  const int64_t key_head = head / (call.heads / call.key_heads);
  for_each_vec(call.dim, [&](int64_t c, auto count) {
    Vec sum = {};
    for (int64_t key = 0; key < call.keys; ++key)
      sum += load(call.v.at(image, key_head, key) + c, count);
    store(sum / static_cast<float>(call.keys), call.out.at(batch, head, i) + c, count);
  });
}

// Probabilities times values, divided by their sums, into the output.
template <typename T>
void weigh_values(const AttentionCall<T>& call, const AttentionScratch<T>& s, const TileRows& tile,
                  int64_t batch, int64_t head, int64_t first) {
  const int64_t first_key = tile.first * kPanel, keys = smaller(tile.end * kPanel, call.keys) - first_key;
  pack_tile(Rows<const T>{s.row + first_key, tile.rows, 0, s.panels * kPanel}, 0, tile.rows, keys, s.p);
  const int64_t first_step = first_key / Step<T>::kDepth, steps = parts_of(keys, Step<T>::kDepth);
  const int64_t chain = Step<T>::chain(steps);
  const auto multiply = multiply_tile_of<T, false>(tile.rows);
  for (int64_t channel = 0; channel < call.dim; channel += kPanel) {
    const auto* panel = s.v + (channel / kPanel * s.value_steps + first_step) * kPanel;
    for (int64_t step = 0; step < steps; step += chain)
      multiply(s.p + step * tile.rows, panel + step * kPanel, s.sums, smaller(chain, steps - step),
               step == 0, reinterpret_cast<const char*>(panel + s.value_steps * kPanel));
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float share = 1.0f / tile.total[r];
      T* to = call.out.at(batch, head, first + r) + channel;
      for_each_vec(smaller(kPanel, call.dim - channel), [&](int64_t c, auto count) {
        store(load(s.sums + r * kPanel + c) * share, to + c, count);
      });
    }
  }
}

// Attention of queries [first, first + rows) of one head.
template <typename T>
void attend_tile(const AttentionCall<T>& call, const AttentionScratch<T>& s, int64_t image,
                 int64_t batch, int64_t head, int64_t first, int64_t rows) {
  TileRows tile = rows_of_tile(call, batch, head, first, rows);
  pack_queries(call, s, batch, head, first, rows);
  const auto multiply = multiply_tile_of<T, false>(rows);
  for (int64_t panel = tile.first; panel < tile.end; ++panel) {
    const auto* keys = s.k + panel * s.steps * kPanel;
    multiply(s.q, keys, s.scores + panel * rows * kPanel, s.steps, true,
             reinterpret_cast<const char*>(keys + s.steps * kPanel));
  }
  const float factor = is_plain(call) ? call.scale / kLn2 : 1.0f;  // else mask_row has multiplied
  for (int64_t r = 0; r < rows; ++r) {
    if (call.seen.data) hide(s, tile, r, call.seen.at(batch, head, first + r));
    tile.top[r] = is_plain(call) ? largest_of_row(call, s, tile, r) : mask_row(s, tile, r);
    tile.total[r] = exponentials(s, tile, r, factor);
    if (call.lse)
      call.lse[(batch * call.heads + head) * call.queries + first + r] =
          (tile.top[r] * factor + std::log2(tile.total[r])) * kLn2;
  }
  weigh_values(call, s, tile, batch, head, first);
  for (int64_t r = 0; r < rows; ++r)
    if (tile.total[r] == 0.0f) write_mean(call, image, batch, head, first + r);
}

// Packs K and V of one key head and what belongs to each key.
template <typename T>
void pack_keys(const AttentionCall<T>& call, const AttentionScratch<T>& s, int64_t image,
               int64_t head) {
  for (int64_t panel = 0; panel < s.panels; ++panel)
    pack_panel(call.k.at(image, head, panel * kPanel), call.k.token_stride,
               smaller(kPanel, call.keys - panel * kPanel), call.dim,
               s.k + panel * s.steps * kPanel);
  pack_values(call.v.at(image, head, 0), call.v.token_stride, call.keys, call.dim, s.value_steps,
              s.v);
  const float* rstd = call.q_weight ? call.rstd + (call.images + image) * call.keys : nullptr;
  const uint8_t* real = call.key_padding_mask ? call.key_padding_mask + image * call.keys : nullptr;
  for (int64_t key = 0; key < s.panels * kPanel; ++key) {
    const bool exists = key < call.keys;
    s.factor[key] = exists ? call.scale / kLn2 * (rstd ? rstd[key] : 1.0f) : 0.0f;
    s.bias[key] = exists && (!real || real[key]) ? 0.0f : kNever;
  }
}

// The statistics of q and k of every token, whose heads are next to each other.
template <typename T>
void measure_rows(const AttentionCall<T>& call) {
  const int64_t rows = call.images * call.keys;
#pragma omp for schedule(static)
  for (int64_t r = 0; r < 2 * rows; ++r) {
    const Heads<const T>& x = r < rows ? call.q : call.k;
    const T* row = x.at(r % rows / call.keys, 0, r % call.keys);
    call.rstd[r] = reciprocal_rms(row, call.heads * call.dim, call.eps);
  }
}

// Bytes of scratch memory that attention() needs, of which each thread takes the same share.
template <typename T>
int64_t attention_workspace(const AttentionCall<T>& call, int threads) {
  return threads * AttentionScratch<T>(call, nullptr).bytes;
}

// workspace: aligned to 64 bytes. keys and queries at least 1.
template <typename T>
void attention(const AttentionCall<T>& call, char* workspace, int threads) {
  const Split tiles{call.queries, parts_of(call.queries, kTileRows)};
  const int64_t group = call.heads / call.key_heads, pairs = call.images * call.key_heads;
  const int64_t all = tiles.parts * group * call.repeats;
  const Split parts{all, smaller(all, parts_of(4 * threads, pairs))};  // for few heads, by queries too
#pragma omp parallel num_threads(threads)
  {
    const int64_t bytes = attention_workspace(call, 1);
    const AttentionScratch<T> s(call, workspace + omp_get_thread_num() * bytes);
    if (call.q_weight) measure_rows(call);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs * parts.parts; ++task) {
      const int64_t pair = task / parts.parts, part = task % parts.parts;
      const int64_t image = pair / call.key_heads, key_head = pair % call.key_heads;
      pack_keys(call, s, image, key_head);
      for (int64_t t = parts.start(part); t < parts.start(part) + parts.size(part); ++t) {
        const int64_t repeat = t / tiles.parts / group, tile = t % tiles.parts;
        const int64_t head = key_head * group + t / tiles.parts % group;
        const int64_t batch =
            call.interleave ? image * call.repeats + repeat : repeat * call.images + image;
        attend_tile(call, s, image, batch, head, tiles.start(tile), tiles.size(tile));
      }
    }
  }
}

}  // namespace internvl::ISA
