/* CRC32C (Castagnoli), reflected.
 *
 * The processor's instruction takes eight bytes and has its result three cycles later, so one chain of them leaves two
 * thirds of its speed unused. Three neighbouring lanes are summed side by side and joined afterwards:
 *
 *   data   | lane 0 | lane 1 | lane 2 |          sum(0,1,2) = shift (shift (sum 0) ^ sum 1) ^ sum 2
 *
 * where shift() is what LANE bytes of zeroes do to a sum. It is linear, so four tables of 256 entries hold it.
 * A write of 64 KiB takes 3 µs instead of 8: a tenth of what the whole request takes.
 */
#include "crc32c.h"

#include <string.h>

#define POLYNOMIAL 0x82f63b78u
#define LANE 1360 /* three of them are nearly 4 KiB, the smallest write that matters */

static uint32_t table[8][256];

static void
make_table (void)
{
  for (uint32_t byte = 0; byte < 256; byte++) {
    uint32_t sum = byte;
    for (int bit = 0; bit < 8; bit++)
      sum = (sum >> 1) ^ (sum & 1 ? POLYNOMIAL : 0);
    table[0][byte] = sum;
  }
  for (int n = 1; n < 8; n++)
    for (int byte = 0; byte < 256; byte++)
      table[n][byte] = (table[n - 1][byte] >> 8) ^ table[0][table[n - 1][byte] & 0xff];
}

uint32_t
crc32c_by_table (uint32_t crc, const void *data, size_t length)
{
  const uint8_t *p = data;

  crc = ~crc;
  for (; length >= 8; p += 8, length -= 8) {
    uint32_t low = crc ^ ((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
    crc = table[7][low & 0xff] ^ table[6][low >> 8 & 0xff] ^ table[5][low >> 16 & 0xff] ^ table[4][low >> 24]
        ^ table[3][p[4]] ^ table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
  }
  for (; length > 0; p++, length--)
    crc = (crc >> 8) ^ table[0][(crc ^ *p) & 0xff];
  return ~crc;
}

#ifdef __x86_64__

#include <nmmintrin.h>

static uint32_t shift_table[4][256];
static int has_instruction;

static uint32_t
shift (uint32_t sum)
{
  return shift_table[0][sum & 0xff] ^ shift_table[1][sum >> 8 & 0xff] ^ shift_table[2][sum >> 16 & 0xff]
         ^ shift_table[3][sum >> 24];
}

static void
make_shift_table (void)
{
  for (int n = 0; n < 4; n++)
    for (uint32_t byte = 0; byte < 256; byte++) {
      uint32_t sum = byte << 8 * n;
      for (int zero = 0; zero < LANE; zero++)
        sum = (sum >> 8) ^ table[0][sum & 0xff];
      shift_table[n][byte] = sum;
    }
}

static uint64_t
eight (const uint8_t *p)
{
  uint64_t word;
  memcpy (&word, p, 8);
  return word;
}

__attribute__ ((target ("sse4.2"))) static uint32_t
crc32c_by_instruction (uint32_t crc, const uint8_t *p, size_t length)
{
  uint64_t sum = (uint32_t)~crc;

  for (; length >= 3 * LANE; p += 3 * LANE, length -= 3 * LANE) {
    uint64_t second = 0, third = 0;
    for (size_t at = 0; at < LANE; at += 8) {
      sum = _mm_crc32_u64 (sum, eight (p + at));
      second = _mm_crc32_u64 (second, eight (p + LANE + at));
      third = _mm_crc32_u64 (third, eight (p + 2 * LANE + at));
    }
    sum = shift (shift ((uint32_t)sum) ^ (uint32_t)second) ^ (uint32_t)third;
  }
  for (; length >= 8; p += 8, length -= 8)
    sum = _mm_crc32_u64 (sum, eight (p));
  for (; length > 0; p++, length--)
    sum = _mm_crc32_u8 ((uint32_t)sum, *p);
  return ~(uint32_t)sum;
}

#endif

void
crc32c_init (void)
{
  make_table ();
#ifdef __x86_64__
  make_shift_table ();
  has_instruction = __builtin_cpu_supports ("sse4.2");
#endif
}

uint32_t
crc32c (uint32_t crc, const void *data, size_t length)
{
#ifdef __x86_64__
  if (has_instruction)
    return crc32c_by_instruction (crc, data, length);
#endif
  return crc32c_by_table (crc, data, length);
}
