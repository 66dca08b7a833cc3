/* The two instructions of AVX-512 VNNI that cpu_decode.c takes, for processors that lack them: a test
   includes this before the source, with the definitions of Intel's manual written out. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static inline __m256i written_dpwssd(__m256i sums, __m256i a, __m256i b)
{
    int32_t s[8];
    int16_t x[16], y[16];
    memcpy(s, &sums, 32);
    memcpy(x, &a, 32);
    memcpy(y, &b, 32);
    for (int i = 0; i < 16; i++)
        s[i / 2] += (int32_t)x[i] * y[i];
    memcpy(&sums, s, 32);
    return sums;
}

/* Bytes without a sign times bytes with one. */
static inline __m256i written_dpbusd(__m256i sums, __m256i a, __m256i b)
{
    int32_t s[8];
    uint8_t x[32];
    int8_t y[32];
    memcpy(s, &sums, 32);
    memcpy(x, &a, 32);
    memcpy(y, &b, 32);
    for (int i = 0; i < 32; i++)
        s[i / 4] += (int32_t)x[i] * y[i];
    memcpy(&sums, s, 32);
    return sums;
}

#define __AVX512VNNI__ 1
#define __AVX512VL__ 1
#undef _mm256_dpwssd_epi32
#undef _mm256_dpbusd_epi32
#define _mm256_dpwssd_epi32 written_dpwssd
#define _mm256_dpbusd_epi32 written_dpbusd
