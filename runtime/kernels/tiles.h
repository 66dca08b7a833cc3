/* Vectors, and the products of small tiles that the C kernels of this folder are made of.

   One source for all builds: vectors are those of GCC and clang, of as many lanes as the processor
   has (16 floats with AVX-512, 8 with AVX2, 4 elsewhere). With GPTOSS_DOUBLE every real is a
   double: so tests compare derivatives with finite differences.

   A product out[i][n] = sum over k of a(i, k) b(k, n) is done a panel at a time: COLUMNS columns of
   b, copied to [k][COLUMNS], which stay in the first cache while all rows pass. A tile of ROWS rows
   and COLUMNS columns is summed in registers. Each element has one order of additions, along k,
   whatever rows are around it and whichever thread does it. */
#ifndef GPTOSS_TILES_H
#define GPTOSS_TILES_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef GPTOSS_DOUBLE
typedef double real;
typedef int64_t whole;
#define REAL_BYTES 8
#else
typedef float real;
typedef int32_t whole;
#define REAL_BYTES 4
#endif
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES (VECTOR_BYTES / REAL_BYTES)
/* A tile's sums fill most registers: 12 x 2 of 32, or 6 x 2 of 16. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 12
#else
#define ROWS 6
#endif
#define COLUMNS (2 * LANES)
/* Of k, taken together: a panel is then 16 KB, or 32 with AVX-512. */
#define DEPTH (REAL_BYTES == 4 ? 256 : 128)

typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(REAL_BYTES), may_alias));
typedef whole ints __attribute__((vector_size(VECTOR_BYTES), aligned(REAL_BYTES), may_alias));
#define ALL(x) ((vec){0} + (real)(x))
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

/* --------------------------------------------------------------------------------- one tile */
/* sums[i][j] += sum over k < depth of a[i][k * step] * panel[k][j], for `rows` x `vectors`. Both and
   `step` are constants wherever this is inlined. */
INLINE void tile(const int rows, const int vectors, const real *const *a, const int64_t step, const real *panel,
                 const int64_t panel_step, int64_t depth, vec sums[ROWS][2])
{
    for (int64_t k = 0; k < depth; k++) {
        vec b[2];
        for (int j = 0; j < vectors; j++)
            b[j] = LOAD(panel + k * panel_step + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            vec x = ALL(a[i][k * step]);
            for (int j = 0; j < vectors; j++)
                sums[i][j] += x * b[j];
        }
    }
}
#endif
