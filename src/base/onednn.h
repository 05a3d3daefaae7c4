#pragma once
// oneDNN 2.x and 3.x alike, for libraries that multiply with it (HEADFOLD_WITH_ONEDNN).

#ifdef HEADFOLD_WITH_ONEDNN
#include <oneapi/dnnl/dnnl.hpp>

namespace headfold::onednn {

inline const dnnl::engine& engine() {
  static const dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  return cpu;
}

/// a b (+ bias, which may be null) = c; dnnl::error (dnnl_unimplemented) where this processor has no kernel for it.
inline dnnl::matmul::primitive_desc describe_product(const dnnl::memory::desc& a, const dnnl::memory::desc& b,
                                                     const dnnl::memory::desc* bias, const dnnl::memory::desc& c,
                                                     const dnnl::primitive_attr& attributes = {}) {
#if DNNL_VERSION_MAJOR >= 3
  return bias != nullptr ? dnnl::matmul::primitive_desc(engine(), a, b, *bias, c, attributes)
                         : dnnl::matmul::primitive_desc(engine(), a, b, c, attributes);
#else
  return bias != nullptr ? dnnl::matmul::primitive_desc(dnnl::matmul::desc(a, b, *bias, c), attributes, engine())
                         : dnnl::matmul::primitive_desc(dnnl::matmul::desc(a, b, c), attributes, engine());
#endif
}

/// Whether it multiplies bfloat16 here: on x86 from AVX-512 on. ONEDNN_MAX_CPU_ISA=AVX2 makes any processor an older
/// one.
inline bool multiplies_bfloat16() {
  static const bool possible = [] {
    try {
      const auto square = [](dnnl::memory::data_type type) {
        return dnnl::memory::desc({16, 16}, type, dnnl::memory::dims{16, 1});
      };
      const auto narrow = square(dnnl::memory::data_type::bf16);
      describe_product(narrow, narrow, nullptr, square(dnnl::memory::data_type::f32));
      return true;
    } catch (const dnnl::error&) {
      return false;
    }
  }();
  return possible;
}

}  // namespace headfold::onednn
#endif
