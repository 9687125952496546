/* What an earlier process left in the spool.
 *
 *   FIRST-LAST.rwj   sealed: believed by its name
 *   FLOOR.open       one, or a few when it died while sealing: read up to the first hole, then sealed
 *   lock             whoever holds it owns the spool
 *
 * Records behind a hole were never told to be durable, and what they follow is missing: they are cut off.
 */
#define _GNU_SOURCE
#include "recover.h"

#include "io.h"
#include "journal.h"

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>

#define DIGITS 20

static int
lock_spool (struct journal *journal)
{
  const char *spool = journal->settings.spool;
  int fd;

  journal->lock_file = journal->folder = -1;
  if (mkdir (spool, 0700) == -1 && errno != EEXIST) {
    nbdkit_error ("spool=%s: %m", spool);
    return -1;
  }
  journal->folder = open (spool, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (journal->folder == -1) {
    nbdkit_error ("spool=%s: %m", spool);
    return -1;
  }
  /* Kept open until the process ends. */
  journal->lock_file = fd = openat (journal->folder, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd == -1 || flock (fd, LOCK_EX | LOCK_NB) == -1) {
    if (errno == EWOULDBLOCK)
      nbdkit_error ("spool=%s: another process uses it", spool);
    else
      nbdkit_error ("spool=%s: cannot lock: %m", spool);
    return -1;
  }
  return 0;
}

/* A number of exactly 20 digits. */
static bool
parse_number (const char *text, uint64_t *number)
{
  *number = 0;
  for (int n = 0; n < DIGITS; n++)
    if (text[n] < '0' || text[n] > '9' || __builtin_mul_overflow (*number, 10, number)
        || __builtin_add_overflow (*number, text[n] - '0', number))
      return false;
  return true;
}

static bool
is_sealed (const char *name, uint64_t *first, uint64_t *last)
{
  return strlen (name) == 2 * DIGITS + 1 + strlen (SUFFIX_SEALED) && parse_number (name, first)
         && name[DIGITS] == '-' && parse_number (name + DIGITS + 1, last)
         && strcmp (name + 2 * DIGITS + 1, SUFFIX_SEALED) == 0 && *first != 0 && *first <= *last;
}

static bool
is_open (const char *name, uint64_t *floor)
{
  return strlen (name) == DIGITS + strlen (SUFFIX_OPEN) && parse_number (name, floor)
         && strcmp (name + DIGITS, SUFFIX_OPEN) == 0;
}

static int
ours (const struct dirent *entry)
{
  uint64_t first, last;

  return is_sealed (entry->d_name, &first, &last) || is_open (entry->d_name, &first);
}

/* The identity of the journal, from the newest file that tells it; a new one for an empty spool. */
static int
identify (struct journal *journal, struct dirent **files, int n)
{
  while (n-- > 0)
    if (segment_journal (journal->folder, files[n]->d_name, journal->origin.journal) == 0)
      return 0;
  if (getrandom (journal->origin.journal, sizeof journal->origin.journal, 0) != sizeof journal->origin.journal) {
    nbdkit_error ("getrandom: %m");
    return -1;
  }
  return 0;
}

static int
add_sealed (struct journal *journal, const char *name, uint64_t first, uint64_t last)
{
  const struct segment segment = { .first = first, .last = last };
  struct stat status;

  if (fstatat (journal->folder, name, &status, 0) == -1
      || remember_sealed (journal, &segment, (uint64_t)status.st_size) == -1) {
    nbdkit_error ("%s/%s: %m", journal->settings.spool, name);
    return -1;
  }
  journal->last = last;
  return 0;
}

/* A file whose header cannot be read is kept for people to look at; it holds nothing that we could go on from. */
static int
put_aside (struct journal *journal, const char *name)
{
  char aside[NAME_ROOM];

  snprintf (aside, sizeof aside, "%.40s.damaged", name);
  nbdkit_error ("%s/%s: not a segment of this journal: kept as %s", journal->settings.spool, name, aside);
  if (renameat (journal->folder, name, journal->folder, aside) == -1) {
    nbdkit_error ("%s/%s: cannot rename: %m", journal->settings.spool, name);
    return -1;
  }
  return 0;
}

/* Seal what is whole in an open file; delete the file if nothing is. */
static int
recover_open (struct journal *journal, const char *name, uint64_t floor)
{
  const uint64_t expected = journal->last != 0 ? journal->last + 1 : 0;
  struct segment *segment;
  uint64_t cut = 0, bytes;
  int result;

  segment = segment_recover (journal->folder, name, expected, journal->origin.journal, &cut);
  if (segment == NULL) {
    if (errno == EBADMSG)
      return put_aside (journal, name);
    nbdkit_error ("%s/%s: %m", journal->settings.spool, name);
    return -1;
  }
  if (segment->entries > 0) {
    result = segment_seal (journal->folder, segment, &bytes);
    if (result == 0)
      result = remember_sealed (journal, segment, bytes);
    journal->last = segment->last;
    journal->recovered.segments++;
  } else {
    result = unlinkat (journal->folder, name, 0);
    if (journal->last == 0 && floor > 1)
      journal->last = floor - 1;
  }
  if (result == -1)
    nbdkit_error ("%s/%s: %m", journal->settings.spool, name);
  journal->recovered.records += segment->entries;
  journal->recovered.cut += cut;
  segment_free (segment);
  return result;
}

static int
recover_files (struct journal *journal, struct dirent **files, int n)
{
  uint64_t first, last;

  if (identify (journal, files, n) == -1)
    return -1;
  for (int i = 0; i < n; i++)
    if (is_sealed (files[i]->d_name, &first, &last) && add_sealed (journal, files[i]->d_name, first, last) == -1)
      return -1;
  for (int i = 0; i < n; i++)
    if (is_open (files[i]->d_name, &first) && recover_open (journal, files[i]->d_name, first) == -1)
      return -1;
  return 0;
}

int
recover (struct journal *journal)
{
  struct dirent **files;
  int n, result;

  if (lock_spool (journal) == -1)
    return -1;
  n = scandirat (journal->folder, ".", &files, ours, alphasort);
  if (n == -1) {
    nbdkit_error ("spool=%s: %m", journal->settings.spool);
    return -1;
  }
  result = recover_files (journal, files, n);
  while (n-- > 0)
    free (files[n]);
  free (files);
  journal->durable = journal->sealed_upto = journal->last;
  if (result == 0 && (journal->recovered.records > 0 || journal->recovered.cut > 0))
    nbdkit_debug ("%s: kept %" PRIu64 " records of unsealed segments, cut %" PRIu64 " bytes; goes on after %" PRIu64,
                  journal->settings.spool, journal->recovered.records, journal->recovered.cut, journal->last);
  return result;
}
