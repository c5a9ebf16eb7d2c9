// Number types and small helpers that mean the same under nvcc and under a plain C++ compiler.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DR_INLINE __host__ __device__ __forceinline__
#ifdef __CUDA_ARCH__
#define DR_UNROLL _Pragma("unroll")
#else
#define DR_UNROLL
#endif
#define DR_LANES DR_UNROLL  // a loop over neighbours: registers of a thread on CUDA, vector lanes on a CPU
#else
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#define DR_INLINE inline __attribute__((always_inline))
#define DR_UNROLL
#define DR_LANES _Pragma("omp simd")
#endif

namespace di_refine {

#ifdef __CUDACC__
using half_t = __half;
using bfloat16_t = __nv_bfloat16;
// Spelled out, because PyTorch's build flags switch the implicit conversions off.
DR_INLINE float widen(half_t v) { return __half2float(v); }
DR_INLINE float widen(bfloat16_t v) { return __bfloat162float(v); }
DR_INLINE void narrow(float v, half_t& out) { out = __float2half_rn(v); }
DR_INLINE void narrow(float v, bfloat16_t& out) { out = __float2bfloat16_rn(v); }
#else
using half_t = c10::Half;
using bfloat16_t = c10::BFloat16;
DR_INLINE float widen(half_t v) { return static_cast<float>(v); }
DR_INLINE float widen(bfloat16_t v) { return static_cast<float>(v); }
DR_INLINE void narrow(float v, half_t& out) { out = half_t(v); }
DR_INLINE void narrow(float v, bfloat16_t& out) { out = bfloat16_t(v); }
#endif
DR_INLINE float widen(float v) { return v; }
DR_INLINE double widen(double v) { return v; }
DR_INLINE void narrow(float v, float& out) { out = v; }
DR_INLINE void narrow(double v, double& out) { out = v; }

// What a stored type is computed in: double for double, float for everything else.
template <typename T> struct ComputeType { using type = float; };
template <> struct ComputeType<double> { using type = double; };
template <typename T> using compute_t = typename ComputeType<T>::type;

// N neighbours in memory, moved in one access (at most 16 bytes).
template <typename T, int N> struct alignas(sizeof(T) * N) Vec { T v[N]; };
template <typename T> constexpr int kVec = 16 / sizeof(T);

#ifdef __CUDA_ARCH__
// nvcc takes such structures apart before it stores them, so they travel as what a register holds.
template <int BYTES> struct RawType;
template <> struct RawType<2> { using type = unsigned short; };
template <> struct RawType<4> { using type = unsigned int; };
template <> struct RawType<8> { using type = uint2; };
template <> struct RawType<16> { using type = uint4; };

template <typename T, int N> __device__ __forceinline__ Vec<T, N> load(const T* from) {
    using Raw = typename RawType<sizeof(T) * N>::type;
    const Raw raw = __ldg(reinterpret_cast<const Raw*>(from));  // no kernel writes what it reads
    return *reinterpret_cast<const Vec<T, N>*>(&raw);
}
template <typename T, int N> __device__ __forceinline__ void store(T* to, const Vec<T, N>& value) {
    using Raw = typename RawType<sizeof(T) * N>::type;
    __stwb(reinterpret_cast<Raw*>(to), *reinterpret_cast<const Raw*>(&value));
}
#else
template <typename T, int N> DR_INLINE Vec<T, N> load(const T* from) {
    return *reinterpret_cast<const Vec<T, N>*>(from);
}
template <typename T, int N> DR_INLINE void store(T* to, const Vec<T, N>& value) {
    *reinterpret_cast<Vec<T, N>*>(to) = value;
}
#endif

DR_INLINE bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// i % n, leaving i / n in i; a 64-bit division costs several times a 32-bit one.
DR_INLINE int64_t split(int64_t& i, int64_t n) {
    int64_t quotient;
    if (((i | n) >> 32) == 0)
        quotient = static_cast<uint32_t>(i) / static_cast<uint32_t>(n);
    else
        quotient = i / n;
    const int64_t rest = i - quotient * n;
    i = quotient;
    return rest;
}

}  // namespace di_refine
