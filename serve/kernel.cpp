// One decoding step of a Mixtral on a CPU: for each of n sequences one more position, from its id to the logits of the
// next. At a few sequences the time goes into reading weights and, in a framework, into calling many small operations:
// here there is one call, weights may be stored as bfloat16 or int8, and each is read once for all sequences.
//
// serve/kernel.py compiles this file and mirrors its structs. All tensors are contiguous, sums are in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int ROWS = 2, COLUMNS = 4;  // of a product at a time: the registers hold their sums
constexpr int FEW = 5;  // sequences, for which weights are best read row by row, in the order of memory
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));

enum Type : int32_t { FLOAT32, BFLOAT16, INT8 };

}  // namespace

extern "C" {

struct Matrix {        // [rows, columns], as in torch's Linear; columns divide by LANES
  const void* data;
  const float* scale;  // [rows], of INT8
  int32_t rows, columns, type;
};

struct Layer {
  const float *attention_norm, *expert_norm;  // [hidden]
  Matrix qkv, output, router;
  const Matrix *gate_up, *down;  // [experts]
  float *keys, *values;          // [slots, kv_heads, positions, head_dim]
};

struct Model {
  const Layer* layers;
  const float *embeddings, *norm;  // [vocabulary, hidden], [hidden]
  const float *cosines, *sines;    // [positions, head_dim]
  Matrix head;
  int32_t num_layers, hidden, heads, kv_heads, head_dim, experts, top_k, positions;
  float epsilon;
};

}  // extern "C"

namespace {

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }

// LANES weights as floats.
inline Floats unpacked(const float* from) { return load(from); }
inline Floats unpacked(const uint16_t* from) {
  const Words bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
  Floats floats;
  std::memcpy(&floats, &bits, sizeof bits);
  return floats;
}
inline Floats unpacked(const int8_t* from) {
  const Shorts shorts = __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Shorts);
  return __builtin_convertvector(__builtin_convertvector(shorts, Integers), Floats);
}

// In halves: one number after the other, each addition would wait for the one before it.
template <int N = LANES, typename V>
inline float total(V v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typedef float Half __attribute__((vector_size(2 * N)));
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return total<N / 2>(low + high);
  }
}

// Dot products of R rows with K sequences, each weight read once. The order of the sums depends on neither: a sequence
// gets the same numbers in any company.
template <typename T, int R, int K>
void dots(const T* rows, const float* scale, const float* x, size_t size, float* out, size_t stride) {
  Floats even[R][K] = {}, odd[R][K] = {};
  size_t i = 0;
  for (; i + 2 * LANES <= size; i += 2 * LANES)
    for (int r = 0; r < R; r++) {
      const T* row = rows + r * size + i;
      const Floats first = unpacked(row), second = unpacked(row + LANES);
      for (int k = 0; k < K; k++) {
        even[r][k] += first * load(x + k * size + i);
        odd[r][k] += second * load(x + k * size + i + LANES);
      }
    }
  for (int k = 0; k < K; k++)
    for (int r = 0; r < R; r++) {
      if (i < size) even[r][k] += unpacked(rows + r * size + i) * load(x + k * size + i);
      out[k * stride + r] = (scale ? scale[r] : 1.0f) * total(even[r][k] + odd[r][k]);
    }
}

template <typename T, int R>
void rows_times(const T* rows, const float* scale, const float* x, int n, size_t size, float* out, size_t stride) {
  for (; n >= COLUMNS; n -= COLUMNS, x += COLUMNS * size, out += COLUMNS * stride)
    dots<T, R, COLUMNS>(rows, scale, x, size, out, stride);
  if (n == 3) dots<T, R, 3>(rows, scale, x, size, out, stride);
  if (n == 2) dots<T, R, 2>(rows, scale, x, size, out, stride);
  if (n == 1) dots<T, R, 1>(rows, scale, x, size, out, stride);
}

template <typename T>
void multiply_as(const Matrix& m, const float* x, int n, float* out) {
  const T* rows = static_cast<const T*>(m.data);
  const float* scale = m.scale;
  int r = 0;
  for (; n > FEW && r + ROWS <= m.rows; r += ROWS)
    rows_times<T, ROWS>(rows + size_t(r) * m.columns, scale ? scale + r : nullptr, x, n, m.columns, out + r, m.rows);
  for (; r < m.rows; r++)
    rows_times<T, 1>(rows + size_t(r) * m.columns, scale ? scale + r : nullptr, x, n, m.columns, out + r, m.rows);
}

// out[b][r] = sum over c of x[b][c] * m[r][c], b < n.
void multiply(const Matrix& m, const float* x, int n, float* out) {
  if (m.type == FLOAT32) multiply_as<float>(m, x, n, out);
  if (m.type == BFLOAT16) multiply_as<uint16_t>(m, x, n, out);
  if (m.type == INT8) multiply_as<int8_t>(m, x, n, out);
}

void rms_norm(const float* x, const float* weight, int size, float epsilon, float* out) {
  double squares = 0;
  for (int i = 0; i < size; i++) squares += double(x[i]) * x[i];
  const float scale = 1.0f / std::sqrt(float(squares / size) + epsilon);
  for (int i = 0; i < size; i++) out[i] = weight[i] * (x[i] * scale);
}

void softmax(float* x, int size) {
  const float most = *std::max_element(x, x + size);
  float sum = 0;
  for (int i = 0; i < size; i++) sum += x[i] = std::exp(x[i] - most);
  for (int i = 0; i < size; i++) x[i] /= sum;
}

// Rotary position embedding (Su et al. 2021), halves rotated against one another; `x` is a head.
void rotate(float* x, const float* cosines, const float* sines, int size) {
  for (int i = 0, half = size / 2; i < half; i++) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + half] = second * cosines[i + half] + first * sines[i + half];
  }
}

class Step {
 public:
  Step(const Model& model, int n, const int32_t* slots, const int32_t* lengths)
      : m(model), n(n), slots(slots), lengths(lengths), x(size_t(n) * m.hidden), normed(x.size()), added(x.size()) {}

  void run(const int64_t* ids, int wanted, float* logits) {
    for (int b = 0; b < n; b++) std::memcpy(&x[size_t(b) * m.hidden], m.embeddings + ids[b] * m.hidden, 4 * m.hidden);
    for (int l = 0; l < m.num_layers; l++) {
      attend(m.layers[l]);
      feed_forward(m.layers[l]);
    }
    norm(m.norm);
    multiply(m.head, &normed[size_t(n - wanted) * m.hidden], wanted, logits);
  }

 private:
  const Model& m;
  const int n;
  const int32_t *slots, *lengths;
  std::vector<float> x, normed, added;  // [n, hidden]
  std::vector<float> qkv, heard, scores, routed, chosen, inner, outer;

  void norm(const float* weight) {
    for (int b = 0; b < n; b++)
      rms_norm(&x[size_t(b) * m.hidden], weight, m.hidden, m.epsilon, &normed[size_t(b) * m.hidden]);
  }

  void attend(const Layer& layer) {
    const int size = m.head_dim, width = layer.qkv.rows;
    norm(layer.attention_norm);
    qkv.resize(size_t(n) * width);
    heard.assign(size_t(n) * m.heads * size, 0);
    multiply(layer.qkv, normed.data(), n, qkv.data());
    for (int b = 0; b < n; b++) {
      const int place = lengths[b];
      float* q = &qkv[size_t(b) * width];
      float *k = q + m.heads * size, *v = k + m.kv_heads * size;
      const size_t turn = size_t(place) * size;
      for (int h = 0; h < m.heads + m.kv_heads; h++) rotate(q + h * size, m.cosines + turn, m.sines + turn, size);
      for (int h = 0; h < m.kv_heads; h++) {
        const size_t start = (size_t(slots[b]) * m.kv_heads + h) * m.positions * size;
        std::memcpy(layer.keys + start + turn, k + h * size, 4 * size);
        std::memcpy(layer.values + start + turn, v + h * size, 4 * size);
      }
      for (int h = 0; h < m.heads; h++) attend(layer, b, h, q + h * size, place + 1);
    }
    multiply(layer.output, heard.data(), n, added.data());
    for (size_t i = 0; i < x.size(); i++) x[i] += added[i];
  }

  // Scaled dot-product attention of one query of sequence b over its first `length` positions.
  void attend(const Layer& layer, int b, int head, const float* query, int length) {
    const int size = m.head_dim, group = m.heads / m.kv_heads;
    const size_t start = (size_t(slots[b]) * m.kv_heads + head / group) * m.positions * size;
    const float scale = 1.0f / std::sqrt(float(size));
    scores.resize(length);
    for (int p = 0; p < length; p++) {
      const float* key = layer.keys + start + size_t(p) * size;
      Floats sum = {};
      for (int i = 0; i < size; i += LANES) sum += load(query + i) * load(key + i);
      scores[p] = scale * total(sum);
    }
    softmax(scores.data(), length);
    float* out = &heard[(size_t(b) * m.heads + head) * size];
    for (int p = 0; p < length; p++) {
      const float* value = layer.values + start + size_t(p) * size;
      for (int i = 0; i < size; i += LANES) *reinterpret_cast<Floats*>(out + i) += scores[p] * load(value + i);
    }
  }

  // The top_k of the experts for each sequence, their weights made to sum to 1; sequences are grouped by expert.
  void feed_forward(const Layer& layer) {
    norm(layer.expert_norm);
    std::vector<std::vector<std::pair<int, float>>> rows(m.experts);  // of each expert: sequence, weight
    routed.resize(size_t(n) * m.experts);
    multiply(layer.router, normed.data(), n, routed.data());
    std::vector<int> order(m.experts);
    for (int b = 0; b < n; b++) {
      float* weights = &routed[size_t(b) * m.experts];
      softmax(weights, m.experts);
      for (int e = 0; e < m.experts; e++) order[e] = e;
      std::partial_sort(order.begin(), order.begin() + m.top_k, order.end(),
                        [&](int a, int c) { return weights[a] > weights[c] || (weights[a] == weights[c] && a < c); });
      float sum = 0;
      for (int k = 0; k < m.top_k; k++) sum += weights[order[k]];
      for (int k = 0; k < m.top_k; k++) rows[order[k]].push_back({b, weights[order[k]] / sum});
    }
    for (int e = 0; e < m.experts; e++)
      if (!rows[e].empty()) apply(layer.gate_up[e], layer.down[e], rows[e]);
  }

  // One expert, silu(gate) * up, then down, added to its sequences by weight.
  void apply(const Matrix& gate_up, const Matrix& down, const std::vector<std::pair<int, float>>& rows) {
    const int count = int(rows.size()), size = down.columns;
    chosen.resize(size_t(count) * m.hidden);
    inner.resize(size_t(count) * 2 * size);
    outer.resize(size_t(count) * m.hidden);
    for (int i = 0; i < count; i++)
      std::memcpy(&chosen[size_t(i) * m.hidden], &normed[size_t(rows[i].first) * m.hidden], 4 * m.hidden);
    multiply(gate_up, chosen.data(), count, inner.data());
    chosen.resize(size_t(count) * size);
    for (int i = 0; i < count; i++)
      for (int j = 0; j < size; j++) {
        const float gate = inner[size_t(i) * 2 * size + j], up = inner[size_t(i) * 2 * size + size + j];
        chosen[size_t(i) * size + j] = gate / (1 + std::exp(-gate)) * up;
      }
    multiply(down, chosen.data(), count, outer.data());
    for (int i = 0; i < count; i++)
      for (int j = 0; j < m.hidden; j++)
        x[size_t(rows[i].first) * m.hidden + j] += rows[i].second * outer[size_t(i) * m.hidden + j];
  }
};

}  // namespace

// Append ids [n] to the sequences in `slots` [n], which hold `lengths` [n] positions before each; a slot that is named
// again has one more. The logits of the last `wanted` come back, [wanted, vocabulary].
extern "C" void step(const Model* model, int32_t n, const int64_t* ids, const int32_t* slots, const int32_t* lengths,
                     int32_t wanted, float* logits) {
  Step(*model, n, slots, lengths).run(ids, wanted, logits);
}
