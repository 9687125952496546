/* A segment on disk. The text is appliance/journal/FORMAT.md; both sides are held together by golden files.
 *
 *   header | disks | record … record | index entry … | footer
 *
 * The structs are the bytes: no padding, little-endian.
 */
#ifndef REWIND_JOURNAL_FORMAT_H
#define REWIND_JOURNAL_FORMAT_H

#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "segments are little-endian, and so must be the machine that writes them"
#endif

#define FORMAT_VERSION 1
#define HEADER_MAGIC "RWJSEGM1"
#define FOOTER_MAGIC "RWJFOOT1"
#define RECORD_MAGIC 0x524a5752u /* "RWJR" */

#define DISK_NAME 32
#define NO_DISK 0xffffu

enum kind { KIND_WRITE = 1, KIND_ZERO = 2, KIND_TRIM = 3, KIND_MARK = 4, KIND_LOST = 5 };
enum flag { FLAG_FUA = 1, FLAG_MAY_TRIM = 2 };

struct segment_header {
  char magic[8];
  uint32_t length; /* with the disks that follow: where the first record begins */
  uint16_t version;
  uint16_t disks;
  uint8_t journal[16];
  uint8_t boot[16];
  uint64_t floor; /* no record in here has a lower sequence number */
  int64_t session;
  int64_t wall;
  int64_t mono;
  uint32_t crc; /* of header and disks, with zero in this place */
  uint32_t zero;
};

struct segment_disk {
  char name[DISK_NAME]; /* filled up with zeroes */
  uint64_t size;
};

struct record_header {
  uint32_t magic;
  uint32_t crc; /* of the rest of the header and of the payload */
  uint64_t sequence;
  int64_t wall;
  int64_t mono;
  uint64_t offset;
  uint32_t length;
  uint16_t disk;
  uint8_t kind;
  uint8_t flags;
};

struct index_entry {
  uint64_t offset;
  uint32_t position; /* of the record's header in the file */
  uint32_t length;
  uint32_t relative; /* sequence number, less that of the segment's first record */
  uint16_t disk;
  uint8_t kind;
  uint8_t flags;
};

struct segment_footer {
  char magic[8];
  uint64_t index; /* its position: the end of the last record */
  uint64_t first;
  uint64_t last;
  int64_t wall_first;
  int64_t wall_last;
  uint64_t payload;
  uint32_t count;
  uint32_t index_crc;
  uint32_t crc; /* of what stands before */
  uint32_t zero;
};

_Static_assert (sizeof (struct segment_header) == 88, "segment header");
_Static_assert (sizeof (struct segment_disk) == 40, "disk");
_Static_assert (sizeof (struct record_header) == 48, "record header");
_Static_assert (sizeof (struct index_entry) == 24, "index entry");
_Static_assert (sizeof (struct segment_footer) == 72, "footer");

#endif
