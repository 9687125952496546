#ifndef REWIND_JOURNAL_CRC32C_H
#define REWIND_JOURNAL_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Once, before the first sum and while there is one thread. */
void crc32c_init (void);

/* Goes on from `crc`, 0 at the beginning. Any thread. */
uint32_t crc32c (uint32_t crc, const void *data, size_t length);

/* As above by tables alone: what a processor without the instruction uses, and what the other is checked against. */
uint32_t crc32c_by_table (uint32_t crc, const void *data, size_t length);

#endif
