/* One segment file: made, scanned, sealed. No locks in here: a segment belongs to whoever holds it. */
#ifndef REWIND_JOURNAL_SEGMENT_H
#define REWIND_JOURNAL_SEGMENT_H

#include "format.h"

#include <stdbool.h>
#include <stddef.h>

/* Positions are 32 bits in the index; a request of 64 MiB must still fit below. */
#define SEGMENT_MOST ((uint64_t)4000 << 20)
/* Index entries of one segment: 24 MiB of memory at most. */
#define ENTRIES_MOST ((size_t)1 << 20)
#define SPARE "spare"
#define SPARE_ROOM ((uint64_t)128 << 10)
#define SUFFIX_OPEN ".open"
#define SUFFIX_SEALED ".rwj"
/* Longest name: two numbers of 20 digits, a dash, a suffix. */
#define NAME_ROOM 64

/* What every segment of one process has in common. */
struct origin {
  uint8_t journal[16];
  uint8_t boot[16];
  int64_t session;
  const struct segment_disk *disks;
  uint16_t n_disks;
};

struct segment {
  struct segment *next; /* the newer one */
  int fd;
  char name[NAME_ROOM]; /* in the spool folder */
  uint64_t floor;
  uint64_t first, last;    /* of its records; first is 0 while there is none */
  uint64_t tail;           /* where the next record goes */
  uint64_t room;           /* how far the file system promised space */
  uint64_t payload;
  int64_t wall_first, wall_last;
  int64_t born;            /* monotonic time of the first record */
  struct index_entry *index;
  size_t entries;
  unsigned writing;        /* records that were given a place and are not all written */
  unsigned syncing;        /* threads that use fd without the lock */
  bool dirty;              /* written to since the last fdatasync began */
};

/* A file that will be the next segment. `room` is what it has the file system's promise for. */
struct spare {
  int fd; /* -1: there is none */
  uint64_t room;
};

/* Make a spare with room for a header, marks and notes: so that the current segment can be sealed on a full disk too.
 * -1 and errno: there is none.
 */
int segment_spare (int folder, struct spare *spare);

/* The spare becomes an empty segment of that floor; its name is durable. NULL and errno: the spare is as it was. */
struct segment *segment_begin (int folder, const struct spare *spare, const struct origin *origin, uint64_t floor);

/* Get the file system's promise for the first `room` bytes of a file; what it has promised is kept in `promised`. -1 and
 * errno: the promise is as it was.
 */
int segment_promise (int fd, uint64_t room, uint64_t *promised);

/* Read an unsealed file up to its first hole. `expected` is the sequence number its first record must have, 0 for any.
 * `*cut` is how many bytes behind the last whole record are not zero. NULL and errno on failure; EBADMSG: no segment
 * of this version, `journal` (16 bytes) of another journal.
 */
struct segment *segment_recover (int folder, const char *name, uint64_t expected, const uint8_t *journal, uint64_t *cut);

/* Name the file for its floor, which was raised since it was made. Not durable before the folder is synced. */
int segment_rename_open (int folder, struct segment *segment);

/* Index, footer, fsync, rename, fsync of the folder. After a failure the file still is an unsealed segment with all its
 * records, and it may be tried again. `*bytes` is the size of the file.
 */
int segment_seal (int folder, struct segment *segment, uint64_t *bytes);

void segment_free (struct segment *segment);

/* The journal that a file, sealed or not, belongs to. -1 and errno, EBADMSG when it has no whole header. */
int segment_journal (int folder, const char *name, uint8_t journal[16]);

/* What it will take up when it is sealed. */
static inline uint64_t
segment_size (const struct segment *segment)
{
  return segment->tail + segment->entries * sizeof (struct index_entry) + sizeof (struct segment_footer);
}

static inline void
segment_note (struct segment *segment, const struct record_header *record, uint64_t position)
{
  if (segment->entries == 0) {
    segment->first = record->sequence;
    segment->wall_first = record->wall;
    segment->born = record->mono;
  }
  segment->index[segment->entries++] = (struct index_entry){
    .offset = record->offset,
    .position = (uint32_t)position,
    .length = record->length,
    .relative = (uint32_t)(record->sequence - segment->first),
    .disk = record->disk,
    .kind = record->kind,
    .flags = record->flags,
  };
  segment->last = record->sequence;
  segment->wall_last = record->wall;
}

/* Bytes that follow a record's header. */
static inline uint64_t
record_payload (const struct record_header *record)
{
  return record->kind == KIND_WRITE || record->kind == KIND_MARK ? record->length : 0;
}

#endif
