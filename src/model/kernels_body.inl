// Included once per instruction set and element type by kernels.cpp: HEADFOLD_ELEMENT is float or Bf16. Plain loops
// that the compiler vectorises; no standard library calls, so that no inline function of the library is emitted for a
// newer instruction set.

static inline __attribute__((always_inline)) float exp_of(float x) {
  // exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2, Taylor-like polynomial of degree 6 (Cephes
  // coefficients).
  const float limited = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = limited * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
  const float n = shifted - 12582912.0f;
  const float r = (limited - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::int32_t power = (static_cast<std::int32_t>(n) + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &power, sizeof(scale));
  const float value = p * scale;
  const float flushed = x < -87.0f ? 0.0f : value;
  return x == x ? flushed : x;
}

static void rms_norm(const void* x_, const void* weight_, void* y_, std::int64_t n, float eps) {
  const auto* x = static_cast<const HEADFOLD_ELEMENT*>(x_);
  const auto* weight = static_cast<const HEADFOLD_ELEMENT*>(weight_);
  auto* y = static_cast<HEADFOLD_ELEMENT*>(y_);
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (std::int64_t i = 0; i < n; ++i) squares += get(x[i]) * get(x[i]);
  const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) put(y[i], rounded(y[i], get(x[i]) * factor) * get(weight[i]));
}

static void layer_norm(const void* x_, const void* weight_, const void* bias_, void* y_, std::int64_t n, float eps) {
  const auto* x = static_cast<const HEADFOLD_ELEMENT*>(x_);
  const auto* weight = static_cast<const HEADFOLD_ELEMENT*>(weight_);
  const auto* bias = static_cast<const HEADFOLD_ELEMENT*>(bias_);
  auto* y = static_cast<HEADFOLD_ELEMENT*>(y_);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += get(x[i]);
  const float mean = sum / static_cast<float>(n);
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (std::int64_t i = 0; i < n; ++i) {
    const float d = get(x[i]) - mean;
    squares += d * d;
  }
  const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) put(y[i], (get(x[i]) - mean) * factor * get(weight[i]) + get(bias[i]));
}

static void rotate(const void* x_, const float* cosine, const float* sine, void* y_, std::int64_t half) {
  const auto* x = static_cast<const HEADFOLD_ELEMENT*>(x_);
  auto* y = static_cast<HEADFOLD_ELEMENT*>(y_);
#pragma omp simd
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = get(x[i]);
    const float b = get(x[i + half]);
    put(y[i], a * cosine[i] - b * sine[i]);
    put(y[i + half], b * cosine[i] + a * sine[i]);
  }
}

static void silu_times(void* gate_, const void* up_, std::int64_t n) {
  auto* gate = static_cast<HEADFOLD_ELEMENT*>(gate_);
  const auto* up = static_cast<const HEADFOLD_ELEMENT*>(up_);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float g = get(gate[i]);
    put(gate[i], g / (1.0f + exp_of(-g)) * get(up[i]));
  }
}

static void gelu(void* x_, std::int64_t n) {
  auto* x = static_cast<HEADFOLD_ELEMENT*>(x_);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float v = get(x[i]);
    // 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
    const float u = 0.79788456f * v * (1.0f + 0.044715f * v * v);
    put(x[i], v / (1.0f + exp_of(-2.0f * u)));
  }
}

static void softmax(float* scores, void* probabilities_, const ScoreRow& row) {
  auto* probabilities = static_cast<HEADFOLD_ELEMENT*>(probabilities_);
  const std::int64_t n = row.visible;
  const float scale = row.scale;
  const float slope = row.slope;
  float largest = -__builtin_inff();
  if (slope != 0) {
#pragma omp simd reduction(max : largest)
    for (std::int64_t i = 0; i < n; ++i) {
      const float s =
          scores[i] * scale + rounded(probabilities[i], slope * static_cast<float>(static_cast<std::int32_t>(i)));
      scores[i] = s;
      largest = s > largest ? s : largest;
    }
  } else {
#pragma omp simd reduction(max : largest)
    for (std::int64_t i = 0; i < n; ++i) {
      const float s = scores[i] * scale;
      scores[i] = s;
      largest = s > largest ? s : largest;
    }
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) {
    const float e = exp_of(scores[i] - largest);
    scores[i] = e;
    sum += e;
  }
  const float factor = 1.0f / sum;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) put(probabilities[i], scores[i] * factor);
#pragma omp simd
  for (std::int64_t i = n; i < row.total; ++i) put(probabilities[i], 0.0f);
}

static void dots(const void* a_, const void* b_, std::int64_t stride, std::int64_t count, std::int64_t n, float* sums) {
  const auto* a = static_cast<const HEADFOLD_ELEMENT*>(a_);
  const auto* b = static_cast<const HEADFOLD_ELEMENT*>(b_);
  std::int64_t j = 0;
  // Four rows at a time: independent sums hide the latency of the additions.
  for (; j + 4 <= count; j += 4, b += 4 * stride) {
    const HEADFOLD_ELEMENT *b0 = b, *b1 = b + stride, *b2 = b + 2 * stride, *b3 = b + 3 * stride;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (std::int64_t i = 0; i < n; ++i) {
      const float x = get(a[i]);
      s0 += x * get(b0[i]);
      s1 += x * get(b1[i]);
      s2 += x * get(b2[i]);
      s3 += x * get(b3[i]);
    }
    sums[j] = s0;
    sums[j + 1] = s1;
    sums[j + 2] = s2;
    sums[j + 3] = s3;
  }
  for (; j < count; ++j, b += stride) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < n; ++i) sum += get(a[i]) * get(b[i]);
    sums[j] = sum;
  }
}

static void load(const void* x_, float* values, std::int64_t n) {
  const auto* x = static_cast<const HEADFOLD_ELEMENT*>(x_);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) values[i] = get(x[i]);
}

static void add_scaled(float* sum, float factor, const void* x_, std::int64_t n) {
  const auto* x = static_cast<const HEADFOLD_ELEMENT*>(x_);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) sum[i] += factor * get(x[i]);
}

static void store(const float* values, void* x_, std::int64_t n) {
  auto* x = static_cast<HEADFOLD_ELEMENT*>(x_);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) put(x[i], values[i]);
}

static void rms_norm_backward(const void* x_, const void* weight_, const void* dy_, void* dx_, float* dweight,
                              std::int64_t n, float eps) {
  const auto* x = static_cast<const HEADFOLD_ELEMENT*>(x_);
  const auto* weight = static_cast<const HEADFOLD_ELEMENT*>(weight_);
  const auto* dy = static_cast<const HEADFOLD_ELEMENT*>(dy_);
  auto* dx = static_cast<HEADFOLD_ELEMENT*>(dx_);
  float squares = 0, product = 0;
#pragma omp simd reduction(+ : squares, product)
  for (std::int64_t i = 0; i < n; ++i) {
    squares += get(x[i]) * get(x[i]);
    product += get(x[i]) * get(dy[i]) * get(weight[i]);
  }
  const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
  const float along = product * factor * factor / static_cast<float>(n);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i)
    put(dx[i], get(dx[i]) + factor * (get(dy[i]) * get(weight[i]) - get(x[i]) * along));
  if (dweight == nullptr) return;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) dweight[i] += get(dy[i]) * get(x[i]) * factor;
}

static void layer_norm_backward(const void* x_, const void* weight_, const void* dy_, void* dx_, float* dweight,
                                float* dbias, std::int64_t n, float eps) {
  const auto* x = static_cast<const HEADFOLD_ELEMENT*>(x_);
  const auto* weight = static_cast<const HEADFOLD_ELEMENT*>(weight_);
  const auto* dy = static_cast<const HEADFOLD_ELEMENT*>(dy_);
  auto* dx = static_cast<HEADFOLD_ELEMENT*>(dx_);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += get(x[i]);
  const float mean = sum / static_cast<float>(n);
  float squares = 0, product = 0, total = 0;
#pragma omp simd reduction(+ : squares, product, total)
  for (std::int64_t i = 0; i < n; ++i) {
    const float d = get(x[i]) - mean;
    const float g = get(dy[i]) * get(weight[i]);
    squares += d * d;
    product += d * g;
    total += g;
  }
  const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
  const float along = product * factor * factor / static_cast<float>(n);
  const float level = total / static_cast<float>(n);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i)
    put(dx[i], get(dx[i]) + factor * (get(dy[i]) * get(weight[i]) - level - (get(x[i]) - mean) * along));
  if (dweight == nullptr) return;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    dweight[i] += get(dy[i]) * (get(x[i]) - mean) * factor;
    dbias[i] += get(dy[i]);
  }
}

static void silu_times_backward(void* gate_, void* up_, const void* dy_, std::int64_t n) {
  auto* gate = static_cast<HEADFOLD_ELEMENT*>(gate_);
  auto* up = static_cast<HEADFOLD_ELEMENT*>(up_);
  const auto* dy = static_cast<const HEADFOLD_ELEMENT*>(dy_);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float g = get(gate[i]);
    const float u = get(up[i]);
    const float d = get(dy[i]);
    const float sigmoid = 1.0f / (1.0f + exp_of(-g));
    put(gate[i], d * u * sigmoid * (1.0f + g * (1.0f - sigmoid)));
    put(up[i], d * g * sigmoid);
  }
}

static void gelu_backward(void* x_, const void* dy_, std::int64_t n) {
  auto* x = static_cast<HEADFOLD_ELEMENT*>(x_);
  const auto* dy = static_cast<const HEADFOLD_ELEMENT*>(dy_);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float v = get(x[i]);
    const float u = 0.79788456f * v * (1.0f + 0.044715f * v * v);
    const float slope = 0.79788456f * (1.0f + 3.0f * 0.044715f * v * v);
    const float half = 1.0f / (1.0f + exp_of(-2.0f * u));  // 0.5 (1 + tanh u)
    put(x[i], get(dy[i]) * (half + 2.0f * v * half * (1.0f - half) * slope));
  }
}

static void softmax_backward(const void* probabilities_, const float* dp, void* dscores_, std::int64_t n, float scale) {
  const auto* probabilities = static_cast<const HEADFOLD_ELEMENT*>(probabilities_);
  auto* dscores = static_cast<HEADFOLD_ELEMENT*>(dscores_);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += get(probabilities[i]) * dp[i];
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) put(dscores[i], scale * get(probabilities[i]) * (dp[i] - sum));
}

static float exponential_sum(const float* x, float* y, std::int64_t n, float shift, float factor) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) {
    const float e = exp_of((x[i] - shift) * factor);
    y[i] = e;
    sum += e;
  }
  return sum;
}

static void drop(void* x_, std::int64_t n, std::uint64_t key, std::uint32_t threshold, float keep) {
  auto* x = static_cast<HEADFOLD_ELEMENT*>(x_);
  constexpr std::int64_t kTile = 64;
  for (std::int64_t first = 0; first < n; first += kTile) {
    std::uint64_t hashes[kTile / 4];
#pragma omp simd
    for (std::int64_t j = 0; j < kTile / 4; ++j) {
      std::uint64_t h = key + static_cast<std::uint64_t>(first + 4 * j) + 0x9e3779b97f4a7c15U;
      h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9U;
      h = (h ^ (h >> 27)) * 0x94d049bb133111ebU;
      hashes[j] = h ^ (h >> 31);
    }
    std::uint16_t bits[kTile];
    __builtin_memcpy(bits, hashes, sizeof(bits));
    const std::int64_t count = n - first < kTile ? n - first : kTile;
#pragma omp simd
    for (std::int64_t j = 0; j < count; ++j) put(x[first + j], bits[j] < threshold ? 0.0f : get(x[first + j]) * keep);
  }
}

static void exponential(const float* x, float* y, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = exp_of(x[i]);
}

static constexpr Table make_table(const char* isa) {
  return {isa, rms_norm, layer_norm, rotate, silu_times, gelu, softmax, dots, add_scaled, load, store, rms_norm_backward, layer_norm_backward, silu_times_backward, gelu_backward, softmax_backward, exponential_sum, drop, exponential};
}
