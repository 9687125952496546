/* One segment file: made, scanned, sealed. */
#define _GNU_SOURCE
#include "segment.h"

#include "crc32c.h"
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* The largest request that nbdkit takes. */
#define PAYLOAD_MOST (64u << 20)
#define HEADER_MOST (sizeof (struct segment_header) + 65535 * sizeof (struct segment_disk))

static struct segment *
segment_new (const char *name)
{
  struct segment *segment = calloc (1, sizeof *segment);

  if (segment == NULL)
    return NULL;
  segment->fd = -1;
  snprintf (segment->name, sizeof segment->name, "%s", name);
  /* Address space only: pages come as entries do, and no write ever waits for an array to be moved. */
  segment->index = mmap (NULL, ENTRIES_MOST * sizeof *segment->index, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (segment->index == MAP_FAILED) {
    free (segment);
    return NULL;
  }
  return segment;
}

void
segment_free (struct segment *segment)
{
  if (segment == NULL)
    return;
  if (segment->fd >= 0)
    close (segment->fd);
  munmap (segment->index, ENTRIES_MOST * sizeof *segment->index);
  free (segment);
}

/* --- making ----------------------------------------------------------------------------------------------------- */

static int
write_header (int fd, const struct origin *origin, uint64_t floor, uint64_t *length)
{
  struct segment_header header = {
    .magic = HEADER_MAGIC,
    .length = (uint32_t)(sizeof header + origin->n_disks * sizeof (struct segment_disk)),
    .version = FORMAT_VERSION,
    .disks = origin->n_disks,
    .floor = floor,
    .session = origin->session,
    .wall = now_ns (CLOCK_REALTIME),
    .mono = now_ns (CLOCK_MONOTONIC),
  };
  const size_t disks = origin->n_disks * sizeof (struct segment_disk);

  memcpy (header.journal, origin->journal, 16);
  memcpy (header.boot, origin->boot, 16);
  header.crc = crc32c (crc32c (0, &header, sizeof header), origin->disks, disks);
  *length = header.length;
  return pwrite_both (fd, &header, sizeof header, origin->disks, disks, 0);
}

int
segment_promise (int fd, uint64_t room, uint64_t *promised)
{
  int result;

  if (room <= *promised)
    return 0;
  do
    result = fallocate (fd, 0, 0, (off_t)room);
  while (result == -1 && errno == EINTR);
  if (result == -1) {
    if (errno != EOPNOTSUPP && errno != ENOSYS)
      return -1;
    room = SEGMENT_MOST; /* nothing is promised here: a full disk shows at the write itself */
  }
  *promised = room;
  return 0;
}

int
segment_spare (int folder, struct spare *spare)
{
  spare->room = 0;
  spare->fd = openat (folder, SPARE, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (spare->fd == -1)
    return -1;
  if (segment_promise (spare->fd, SPARE_ROOM, &spare->room) == -1) {
    keep_errno (close (spare->fd));
    keep_errno (unlinkat (folder, SPARE, 0));
    spare->fd = -1;
    return -1;
  }
  return 0;
}

struct segment *
segment_begin (int folder, const struct spare *spare, const struct origin *origin, uint64_t floor)
{
  char name[NAME_ROOM];
  struct segment *segment;

  snprintf (name, sizeof name, "%020" PRIu64 SUFFIX_OPEN, floor);
  segment = segment_new (name);
  if (segment == NULL)
    return NULL;
  segment->fd = spare->fd;
  segment->floor = floor;
  segment->room = spare->room;
  /* The header is in it before it has a name that means something. */
  if (write_header (segment->fd, origin, floor, &segment->tail) == -1 || fsync (segment->fd) == -1
      || renameat (folder, SPARE, folder, name) == -1 || fsync (folder) == -1) {
    segment->fd = -1;
    keep_errno (segment_free (segment));
    return NULL;
  }
  return segment;
}

int
segment_rename_open (int folder, struct segment *segment)
{
  char name[NAME_ROOM];

  snprintf (name, sizeof name, "%020" PRIu64 SUFFIX_OPEN, segment->floor);
  if (strcmp (name, segment->name) != 0) {
    if (renameat (folder, segment->name, folder, name) == -1)
      return -1;
    memcpy (segment->name, name, sizeof name);
  }
  return 0;
}

/* --- scanning --------------------------------------------------------------------------------------------------- */

/* The header with its disks, to be freed; NULL and errno, EBADMSG when it is not whole. */
static struct segment_header *
read_header (int fd)
{
  struct segment_header fixed, *whole;
  uint32_t crc;

  if (pread_full (fd, &fixed, sizeof fixed, 0) == -1)
    return NULL;
  if (memcmp (fixed.magic, HEADER_MAGIC, 8) != 0 || fixed.version != FORMAT_VERSION
      || fixed.length != sizeof fixed + fixed.disks * sizeof (struct segment_disk)) {
    errno = EBADMSG;
    return NULL;
  }
  whole = malloc (fixed.length);
  if (whole == NULL)
    return NULL;
  if (pread_full (fd, whole, fixed.length, 0) == -1) {
    keep_errno (free (whole));
    return NULL;
  }
  crc = whole->crc;
  whole->crc = 0;
  if (crc32c (0, whole, fixed.length) != crc) {
    free (whole);
    errno = EBADMSG;
    return NULL;
  }
  return whole;
}

int
segment_journal (int folder, const char *name, uint8_t journal[16])
{
  int fd = openat (folder, name, O_RDONLY | O_CLOEXEC);
  struct segment_header *header;

  if (fd == -1)
    return -1;
  header = read_header (fd);
  keep_errno (close (fd));
  if (header == NULL)
    return -1;
  memcpy (journal, header->journal, 16);
  free (header);
  return 0;
}

/* 1: a whole record with that sequence number (0: any) at `position`; 0: none; -1: errno. */
static int
read_record (int fd, uint64_t position, uint64_t expected, struct record_header *record, void *payload)
{
  uint64_t length;
  uint32_t crc;

  if (pread_full (fd, record, sizeof *record, position) == -1)
    return errno == EBADMSG ? 0 : -1;
  if (record->magic != RECORD_MAGIC || record->kind < KIND_WRITE || record->kind > KIND_LOST)
    return 0;
  if (expected != 0 ? record->sequence != expected : record->sequence == 0)
    return 0;
  length = record_payload (record);
  if (length > PAYLOAD_MOST)
    return 0;
  if (pread_full (fd, payload, length, position + sizeof *record) == -1)
    return errno == EBADMSG ? 0 : -1;
  crc = crc32c (0, &record->sequence, sizeof *record - offsetof (struct record_header, sequence));
  return crc32c (crc, payload, length) == record->crc;
}

static int
scan (struct segment *segment, uint64_t expected)
{
  struct record_header record;
  void *payload = malloc (PAYLOAD_MOST);
  int found = 0;

  if (payload == NULL)
    return -1;
  while (segment->entries < ENTRIES_MOST && segment->tail < SEGMENT_MOST) {
    found = read_record (segment->fd, segment->tail, expected, &record, payload);
    if (found != 1)
      break;
    segment_note (segment, &record, segment->tail);
    segment->payload += record_payload (&record);
    segment->tail += sizeof record + record_payload (&record);
    expected = record.sequence + 1;
  }
  keep_errno (free (payload));
  return found == -1 ? -1 : 0;
}

/* Bytes from `from` to the last one that is not zero; -1 and errno. */
static int64_t
bytes_behind (int fd, uint64_t from)
{
  static const size_t PIECE = 256 << 10;
  uint8_t *piece = malloc (PIECE);
  uint64_t last = from;
  ssize_t got = -1;

  if (piece == NULL)
    return -1;
  for (uint64_t at = from; (got = pread (fd, piece, PIECE, (off_t)at)) > 0; at += (uint64_t)got)
    for (ssize_t n = got; n > 0; n--)
      if (piece[n - 1] != 0) {
        last = at + (uint64_t)n;
        break;
      }
  keep_errno (free (piece));
  return got == -1 ? -1 : (int64_t)(last - from);
}

struct segment *
segment_recover (int folder, const char *name, uint64_t expected, const uint8_t *journal, uint64_t *cut)
{
  struct segment *segment = segment_new (name);
  struct segment_header *header = NULL;
  int64_t behind;

  if (segment == NULL)
    return NULL;
  segment->fd = openat (folder, name, O_RDWR | O_CLOEXEC);
  if (segment->fd == -1 || (header = read_header (segment->fd)) == NULL)
    goto error;
  if (memcmp (header->journal, journal, 16) != 0) {
    errno = EBADMSG;
    goto error;
  }
  segment->floor = header->floor;
  segment->tail = header->length;
  segment->room = SEGMENT_MOST;
  if (scan (segment, expected) == -1 || (behind = bytes_behind (segment->fd, segment->tail)) == -1)
    goto error;
  *cut = (uint64_t)behind;
  free (header);
  return segment;

error:
  keep_errno (free (header));
  keep_errno (segment_free (segment));
  return NULL;
}

/* --- sealing ---------------------------------------------------------------------------------------------------- */

static int
by_place (const void *left, const void *right)
{
  const struct index_entry *a = left, *b = right;

  if (a->disk != b->disk)
    return a->disk < b->disk ? -1 : 1;
  if (a->offset != b->offset)
    return a->offset < b->offset ? -1 : 1;
  return a->relative < b->relative ? -1 : a->relative > b->relative;
}

static int
write_index (struct segment *segment, uint64_t *size)
{
  const size_t length = segment->entries * sizeof *segment->index;
  struct segment_footer footer = {
    .magic = FOOTER_MAGIC,
    .index = segment->tail,
    .first = segment->first,
    .last = segment->last,
    .wall_first = segment->wall_first,
    .wall_last = segment->wall_last,
    .payload = segment->payload,
    .count = (uint32_t)segment->entries,
  };

  qsort (segment->index, segment->entries, sizeof *segment->index, by_place);
  footer.index_crc = crc32c (0, segment->index, length);
  footer.crc = crc32c (0, &footer, offsetof (struct segment_footer, crc));
  *size = footer.index + length + sizeof footer;
  return pwrite_both (segment->fd, segment->index, length, &footer, sizeof footer, footer.index);
}

int
segment_seal (int folder, struct segment *segment, uint64_t *bytes)
{
  char name[NAME_ROOM];

  if (write_index (segment, bytes) == -1 || ftruncate (segment->fd, (off_t)*bytes) == -1 || fsync (segment->fd) == -1)
    return -1;
  snprintf (name, sizeof name, "%020" PRIu64 "-%020" PRIu64 SUFFIX_SEALED, segment->first, segment->last);
  if (renameat (folder, segment->name, folder, name) == -1)
    return -1;
  memcpy (segment->name, name, sizeof name);
  return fsync (folder);
}
