// Zero-insert, pad, filter, decimate: the arithmetic of the CUDA and of the CPU form.
//
//   y[oy, ox] = gain * sum over ky, kx of tap(ky, kx) * z[oy * down_y + ky - pad_y0, ox * down_x + kx - pad_x0]
//
// where z is x with up - 1 zeros after every sample and zeros outside. There are two paths: tiles for filters of at most
// 4x4 taps and up 2, down 2 or neither, and single pixels for everything else.
#pragma once

#include <climits>

#include "api.h"
#include "scalar.h"

namespace di_refine {

constexpr int kMaxTaps = 32;  // along an axis; the filter must fit into shared memory
constexpr int kTileTaps = 4;

// Tap (ky, kx) in the order it meets the samples, times the gain; zero outside the filter.
template <typename C> DR_INLINE C tap(const Upfirdn2dParams& p, int ky, int kx) {
    if (ky >= p.fh || kx >= p.fw) return 0;
    if (!p.f) return C(p.gain);
    const int y = p.flip ? ky : p.fh - 1 - ky, x = p.flip ? kx : p.fw - 1 - kx;
    const C value = p.outer ? C(p.f[y]) * C(p.f[x]) : C(p.f[y * p.fw + x]);
    return value * C(p.gain);
}

// Write `height` rows of `width` taps, as thread number `thread` of `threads`.
template <typename C>
DR_INLINE void fill_taps(const Upfirdn2dParams& p, int height, int width, C* taps, int thread, int threads) {
    for (int k = thread; k < height * width; k += threads) taps[k] = tap<C>(p, k / width, k % width);
}

enum Path : int { kPixels, kPlain, kUp2, kDown2 };

inline Path path_of(const Upfirdn2dParams& p) {
    if (p.fw > kTileTaps || p.fh > kTileTaps || p.up_x != p.up_y || p.down_x != p.down_y) return kPixels;
    if (p.up_x == 1 && p.down_x == 1) return kPlain;
    if (p.up_x == 2 && p.down_x == 1) return kUp2;
    return p.up_x == 1 && p.down_x == 2 ? kDown2 : kPixels;
}

// channels_last tiles hold V channels; rows of an image must then start at multiples of 16 bytes.
template <typename T, int V> inline bool tiles_fit(const Upfirdn2dParams& p) {
    if (!p.channels_last) return V == 1;
    return V > 1 && p.c % V == 0 && aligned(p.x, sizeof(T) * V) && aligned(p.y, sizeof(T) * V);
}

// A tile is TW x TH pixels of y, V channels deep. Up-sampling tiles start at an even sample of z, hence the shift.
template <int UP, int TW, int TH, int V> struct TileGrid {
    int shift_x, shift_y;
    int64_t across, down, count;
    DR_INLINE explicit TileGrid(const Upfirdn2dParams& p)
        : shift_x(UP == 2 ? p.pad_x0 & 1 : 0), shift_y(UP == 2 ? p.pad_y0 & 1 : 0),
          across((p.out_w + shift_x + TW - 1) / TW), down((p.out_h + shift_y + TH - 1) / TH),
          count(across * down * p.n * p.c / V) {}
};

// One tile. V = 1 is for [n, c, h, w], V > 1 for channels_last. `taps` holds 4x4 numbers.
template <typename T, int UP, int DOWN, int TW, int TH, int V>
DR_INLINE void upfirdn2d_tile(const Upfirdn2dParams& p, const compute_t<T>* taps, int64_t tile) {
    using C = compute_t<T>;
    static_assert(UP == 1 || DOWN == 1, "");
    static_assert(TW % UP == 0 && TH % UP == 0, "");
    constexpr int IW = ((TW - 1) * DOWN + kTileTaps - 1) / UP + 1;  // samples of x that a tile reads
    constexpr int IH = ((TH - 1) * DOWN + kTileTaps - 1) / UP + 1;
    const TileGrid<UP, TW, TH, V> grid(p);

    const int64_t channel = V > 1 ? split(tile, p.c / V) * V : 0;
    const int ox = static_cast<int>(split(tile, grid.across)) * TW - grid.shift_x;
    const int oy = static_cast<int>(split(tile, grid.down)) * TH - grid.shift_y;
    const int ix = (ox * DOWN - p.pad_x0) / UP, iy = (oy * DOWN - p.pad_y0) / UP;  // exact: see TileGrid
    const int64_t pitch = V > 1 ? p.c : 1;  // between neighbours in a row
    const T* x = static_cast<const T*>(p.x) + tile * p.in_h * p.in_w * pitch + channel;
    T* y = static_cast<T*>(p.y) + tile * p.out_h * p.out_w * pitch + channel;

    // Columns are kept by phase, so that neighbours in these arrays take part in the same multiplication.
    constexpr int kOut = TW / UP * V, kIn = (IW + DOWN - 1) / DOWN * V;
    C acc[TH][UP][kOut] = {};
    const bool inside = ix >= 0 && ix + IW <= p.in_w;
    DR_UNROLL
    for (int r = 0; r < IH; r++) {
        if (iy + r < 0 || iy + r >= p.in_h) continue;
        const T* row = x + (static_cast<int64_t>(iy + r) * p.in_w + ix) * pitch;
        C in[DOWN][kIn];
        if (V == 1 && inside) {
            DR_LANES
            for (int c = 0; c < IW / DOWN; c++)
                for (int phase = 0; phase < DOWN; phase++) in[phase][c] = widen(load<T, 1>(row + c * DOWN + phase).v[0]);
        } else {
            DR_UNROLL
            for (int c = 0; c < IW; c++) {
                Vec<T, V> pack = {};
                if (ix + c >= 0 && ix + c < p.in_w) pack = load<T, V>(row + c * pitch);
                DR_LANES
                for (int v = 0; v < V; v++) in[c % DOWN][c / DOWN * V + v] = widen(pack.v[v]);
            }
        }
        DR_UNROLL
        for (int th = 0; th < TH; th++) {
            const int ky = r * UP - th * DOWN;  // the tap through which output row th sees input row r
            if (ky < 0 || ky >= kTileTaps) continue;
            DR_UNROLL
            for (int phase = 0; phase < UP; phase++) {
                DR_UNROLL
                for (int kx = (UP - phase) % UP; kx < kTileTaps; kx += UP) {
                    const C w = taps[ky * kTileTaps + kx];
                    const int c = (phase + kx) / UP;
                    DR_LANES
                    for (int i = 0; i < kOut; i++) acc[th][phase][i] += w * in[c % DOWN][c / DOWN * V + i];
                }
            }
        }
    }

    // The fast ways to store a row: in one access, or, for tiles wider than that, which only a CPU has, as a plain loop.
    constexpr bool kOneAccess = sizeof(T) * TW <= 16;
    const bool whole = ox >= 0 && ox + TW <= p.out_w;
    const bool fits = p.out_w % TW == 0 && grid.shift_x == 0 && aligned(p.y, sizeof(T) * TW);
    DR_UNROLL
    for (int th = 0; th < TH; th++) {
        if (oy + th < 0 || oy + th >= p.out_h) continue;
        T* row = y + (static_cast<int64_t>(oy + th) * p.out_w + ox) * pitch;
        if constexpr (V == 1 && kOneAccess) {
            if (whole && fits) {
                Vec<T, TW> pack;
                DR_UNROLL
                for (int tw = 0; tw < TW; tw++) narrow(acc[th][tw % UP][tw / UP], pack.v[tw]);
                store(row, pack);
                continue;
            }
        } else if constexpr (V == 1) {
            if (whole) {
                DR_LANES
                for (int i = 0; i < TW / UP; i++)
                    for (int phase = 0; phase < UP; phase++) narrow(acc[th][phase][i], row[i * UP + phase]);
                continue;
            }
        }
        DR_UNROLL
        for (int tw = 0; tw < TW; tw++) {
            if (ox + tw < 0 || ox + tw >= p.out_w) continue;
            Vec<T, V> pack;
            DR_LANES
            for (int v = 0; v < V; v++) narrow(acc[th][tw % UP][tw / UP * V + v], pack.v[v]);
            store(row + tw * pitch, pack);
        }
    }
}

// Where filtering one output sample starts: the first tap that meets a sample of x, and that sample.
DR_INLINE void first_tap(int out, int down, int pad, int up, int& k, int& sample) {
    const int start = out * down - pad;  // in z
    k = ((-start) % up + up) % up;
    sample = (start + k) / up;
}

// One element of y, number i in memory; any filter, any factors. `taps` holds fh x fw numbers.
template <typename T>
DR_INLINE void upfirdn2d_pixel(const Upfirdn2dParams& p, const compute_t<T>* taps, int64_t i) {
    using C = compute_t<T>;
    T* y = static_cast<T*>(p.y) + i;
    const int64_t pitch = p.channels_last ? p.c : 1;
    const int64_t channel = p.channels_last ? split(i, p.c) : 0;
    const int ox = static_cast<int>(split(i, p.out_w)), oy = static_cast<int>(split(i, p.out_h));
    const T* x = static_cast<const T*>(p.x) + i * p.in_h * p.in_w * pitch + channel;
    int kx0, ix0, ky, iy;
    first_tap(ox, p.down_x, p.pad_x0, p.up_x, kx0, ix0);
    first_tap(oy, p.down_y, p.pad_y0, p.up_y, ky, iy);
    C acc = 0;
    for (; ky < p.fh; ky += p.up_y, iy++) {
        if (iy < 0 || iy >= p.in_h) continue;
        for (int kx = kx0, ix = ix0; kx < p.fw; kx += p.up_x, ix++) {
            if (ix < 0 || ix >= p.in_w) continue;
            acc += taps[ky * p.fw + kx] * widen(x[(static_cast<int64_t>(iy) * p.in_w + ix) * pitch]);
        }
    }
    narrow(acc, *y);
}

// The tile shapes of the CUDA form: 4 bytes of y a thread and row (8 when up-sampling), or 16 bytes of channels.
template <typename T, int UP, int DOWN, bool CHANNELS_LAST> struct CudaTile {
    static constexpr int W = CHANNELS_LAST ? 2 : (sizeof(T) < 4 ? 2 : 1) * UP;
    static constexpr int H = CHANNELS_LAST ? 2 : DOWN == 2 ? 4 : 8;
    static constexpr int V = CHANNELS_LAST ? kVec<T> : 1;
};

}  // namespace di_refine
