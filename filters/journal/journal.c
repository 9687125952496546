/* The path of a record, and the two threads behind it.
 *
 * Longer than other files here on purpose: numbering, writing, committing and rotating share one lock and its rules, and
 * whoever changes one of them has to see the others.
 */
#define _GNU_SOURCE
#include "journal.h"

#include "crc32c.h"
#include "io.h"
#include "recover.h"
#include "room.h"

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- numbers, with the lock held -------------------------------------------------------------------------------- */

uint64_t
journal_written (const struct journal *journal)
{
  uint64_t written = journal->unfinished.oldest != NULL ? journal->unfinished.oldest->sequence - 1 : journal->last;

  return journal->hole != 0 && journal->hole <= written ? journal->hole - 1 : written;
}

int64_t
journal_waiting_since (const struct journal *journal)
{
  const int64_t first = begun_first (&journal->placeless, begun_first (&journal->unfinished, INT64_MAX));

  return first == INT64_MAX ? 0 : first;
}

uint64_t
journal_used (const struct journal *journal)
{
  uint64_t used = journal->sealed_bytes;

  for (const struct segment *segment = journal->oldest; segment != NULL; segment = segment->next)
    used += segment_size (segment);
  return used;
}

uint64_t
latency_below_us (int step)
{
  uint64_t whole = (uint64_t)1 << step / 4;

  return whole + whole * (uint64_t)(step % 4 + 1) / 4;
}

static int
latency_step (int64_t ns)
{
  uint64_t us = (uint64_t)ns / 1000;
  int power, step;

  if (us < 1)
    return 0;
  power = 63 - __builtin_clzll (us);
  step = 4 * power + (int)((us - ((uint64_t)1 << power)) * 4 >> power);
  return step < LATENCY_STEPS ? step : LATENCY_STEPS - 1;
}

static void
tell_progress (struct journal *journal)
{
  const uint64_t one = 1;

  pthread_cond_broadcast (&journal->progress);
  if (journal->wake_control >= 0 && write (journal->wake_control, &one, sizeof one) == -1) {
    /* EAGAIN: the counter is at its end, so the reader is awake already. */
  }
}

void
journal_fail (struct journal *journal, int error, const char *what)
{
  if (journal->state == STATE_FAILED)
    return;
  journal->state = STATE_FAILED;
  journal->error = error != 0 ? error : EIO;
  errno = journal->error;
  nbdkit_error ("%s: %s failed: %m; nothing is taken any more", journal->settings.spool, what);
  pthread_cond_broadcast (&journal->work_for_committer);
  tell_progress (journal);
}

void
wait_until (pthread_cond_t *condition, pthread_mutex_t *lock, int64_t when)
{
  const struct timespec until = { .tv_sec = when / 1000000000, .tv_nsec = when % 1000000000 };

  pthread_cond_timedwait (condition, lock, &until);
}

/* --- the path of a record --------------------------------------------------------------------------------------- */

/* Sequence number, time and place of a record. -1 and errno: it got none. */
static int
reserve (struct journal *journal, struct record_header *record, struct unfinished *me, struct segment **where,
         uint64_t *position)
{
  const uint64_t need = sizeof *record + record_payload (record);
  struct segment *segment = journal->current;

  if (journal->state == STATE_FAILED) {
    errno = journal->error;
    return -1;
  }
  if (!has_space (journal, record->kind, need)) {
    if (record->kind <= KIND_TRIM) {
      if (journal->state == STATE_OK)
        nbdkit_error ("%s: no space for a record of %" PRIu64 " bytes", journal->settings.spool, need);
      journal->state = STATE_FULL;
    }
    errno = ENOSPC;
    return -1;
  }
  if (record->kind <= KIND_TRIM)
    journal->state = STATE_OK;
  record->sequence = ++journal->last;
  record->wall = now_ns (CLOCK_REALTIME);
  record->mono = now_ns (CLOCK_MONOTONIC);
  *where = segment;
  *position = segment->tail;
  segment_note (segment, record, segment->tail);
  segment->tail += need;
  segment->payload += record_payload (record);
  segment->writing++;
  if (segment->tail >= journal->settings.segment_size && segment->tail - need < journal->settings.segment_size)
    pthread_cond_signal (&journal->work_for_keeper);
  me->sequence = record->sequence;
  if (me->begun == 0)
    me->begun = record->mono;
  enqueue (&journal->unfinished, me);
  if (journal->undurable_since == 0)
    journal->undurable_since = record->mono;
  return 0;
}

static void
count (struct journal *journal, const struct record_header *record, int64_t took)
{
  journal->records++;
  journal->payload += record_payload (record);
  journal->journal_bytes += sizeof *record + record_payload (record) + sizeof (struct index_entry);
  journal->marks += record->kind == KIND_MARK;
  if (record->disk != NO_DISK && record->kind != KIND_LOST) {
    struct disk_counters *disk = &journal->disks[record->disk];
    disk->records++;
    disk->bytes += record->kind == KIND_WRITE ? record->length : 0;
    disk->lost = false;
    journal->latency[latency_step (took)]++;
    if (took > journal->latency_longest)
      journal->latency_longest = took;
  }
}

/* It is written, or has failed with `error`. -1 and errno when the journal has a hole. */
static int
finish (struct journal *journal, const struct record_header *record, struct unfinished *me, struct segment *segment,
        int error)
{
  dequeue (&journal->unfinished, me);
  segment->writing--;
  segment->dirty = true; /* not earlier: a sync that began before the write was there does not count */
  if (segment->writing == 0 && segment != journal->current)
    pthread_cond_signal (&journal->work_for_keeper);
  if (error != 0) {
    /* Its place stays empty, so readers end there. */
    if (journal->hole == 0 || record->sequence < journal->hole)
      journal->hole = record->sequence;
    journal_fail (journal, error, "a write");
  }
  if (journal->state == STATE_FAILED) {
    errno = journal->error;
    return -1;
  }
  count (journal, record, now_ns (CLOCK_MONOTONIC) - me->begun);
  if (journal->wanted > journal->durable)
    pthread_cond_signal (&journal->work_for_committer);
  return 0;
}

static void
ask_durable (struct journal *journal, uint64_t sequence)
{
  if (sequence > journal->wanted)
    journal->wanted = sequence;
  pthread_cond_signal (&journal->work_for_committer);
}

static int
wait_durable (struct journal *journal, uint64_t sequence)
{
  ask_durable (journal, sequence);
  while (journal->durable < sequence && journal->state != STATE_FAILED)
    pthread_cond_wait (&journal->progress, &journal->lock);
  if (journal->durable >= sequence)
    return 0;
  errno = journal->error;
  return -1;
}

int
journal_append (struct journal *journal, enum kind kind, uint16_t disk, uint64_t offset, uint32_t length,
                const void *payload, uint8_t flags, uint64_t *sequence)
{
  struct record_header record = {
    .magic = RECORD_MAGIC, .offset = offset, .length = length, .disk = disk, .kind = (uint8_t)kind, .flags = flags,
  };
  struct unfinished me = { .begun = 0 };
  struct segment *segment;
  uint64_t position;
  int result;

  pthread_mutex_lock (&journal->lock);
  if (kind <= KIND_TRIM && !has_space (journal, kind, sizeof record + record_payload (&record)))
    need_room (journal, sizeof record + record_payload (&record), &me);
  result = reserve (journal, &record, &me, &segment, &position);
  pthread_mutex_unlock (&journal->lock);
  if (result == -1)
    return -1;

  record.crc = crc32c (0, &record.sequence, sizeof record - offsetof (struct record_header, sequence));
  record.crc = crc32c (record.crc, payload, record_payload (&record));
  result = pwrite_both (segment->fd, &record, sizeof record, payload, record_payload (&record), position);

  pthread_mutex_lock (&journal->lock);
  result = finish (journal, &record, &me, segment, result == -1 ? errno : 0);
  if (result == 0 && flags & FLAG_FUA)
    result = wait_durable (journal, record.sequence);
  keep_errno (pthread_mutex_unlock (&journal->lock));
  if (sequence != NULL)
    *sequence = record.sequence;
  return result;
}

void
journal_lost (struct journal *journal, uint16_t disk, uint64_t offset, uint32_t length)
{
  bool first;

  pthread_mutex_lock (&journal->lock);
  journal->disks[disk].refused++;
  /* One note for each time: a client that goes on trying must not fill what is kept free. */
  first = !journal->disks[disk].lost;
  journal->disks[disk].lost = true;
  pthread_mutex_unlock (&journal->lock);
  if (first)
    journal_append (journal, KIND_LOST, disk, offset, length, NULL, 0, NULL);
}

int
journal_flush (struct journal *journal)
{
  int result;

  pthread_mutex_lock (&journal->lock);
  result = wait_durable (journal, journal->last);
  keep_errno (pthread_mutex_unlock (&journal->lock));
  return result;
}

uint64_t
journal_ask_durable (struct journal *journal)
{
  uint64_t sequence;

  pthread_mutex_lock (&journal->lock);
  sequence = journal->last;
  ask_durable (journal, sequence);
  pthread_mutex_unlock (&journal->lock);
  return sequence;
}

uint64_t
journal_ask_sealed (struct journal *journal)
{
  uint64_t sequence;

  pthread_mutex_lock (&journal->lock);
  sequence = journal->last;
  if (sequence > journal->seal_wanted)
    journal->seal_wanted = sequence;
  pthread_cond_signal (&journal->work_for_keeper);
  pthread_mutex_unlock (&journal->lock);
  return sequence;
}

/* --- the committer ---------------------------------------------------------------------------------------------- */

/* Sync every unsealed segment that was written to. The lock is held, and let go of meanwhile. -1 and errno. */
static int
sync_segments (struct journal *journal)
{
  int result = 0;

  /* The keeper takes segments off the front of the list only when nobody syncs them. */
  for (struct segment *segment = journal->oldest, *next; segment != NULL && result == 0; segment = next) {
    if (segment->dirty) {
      segment->dirty = false;
      segment->syncing++;
      pthread_mutex_unlock (&journal->lock);
      result = fdatasync (segment->fd);
      keep_errno (pthread_mutex_lock (&journal->lock));
      segment->syncing--;
      next = segment->next;
      if (segment->syncing == 0 && segment != journal->current)
        pthread_cond_signal (&journal->work_for_keeper);
    } else
      next = segment->next;
  }
  return result;
}

/* Everything up to `sequence` is on the disk; what is not was recorded after `since`, or hardly before. */
static void
now_durable (struct journal *journal, uint64_t sequence, int64_t since)
{
  if (sequence > journal->durable)
    journal->durable = sequence;
  journal->undurable_since = journal->last > journal->durable ? since : 0;
  tell_progress (journal);
}

static void
commit (struct journal *journal)
{
  const uint64_t written = journal_written (journal);
  const int64_t begun = now_ns (CLOCK_MONOTONIC);
  int64_t took;

  if (sync_segments (journal) == -1) {
    journal_fail (journal, errno, "fdatasync");
    return;
  }
  took = now_ns (CLOCK_MONOTONIC) - begun;
  journal->fsyncs++;
  journal->fsync_total += took;
  if (took > journal->fsync_longest)
    journal->fsync_longest = took;
  now_durable (journal, written, begun);
}

static void *
committer (void *argument)
{
  struct journal *journal = argument;
  int64_t due = now_ns (CLOCK_MONOTONIC) + journal->settings.commit_ns;

  pthread_mutex_lock (&journal->lock);
  while (journal->state != STATE_FAILED) {
    const bool news = journal_written (journal) > journal->durable;
    const int64_t now = now_ns (CLOCK_MONOTONIC);

    if (news && (now >= due || journal->wanted > journal->durable || journal->stopping)) {
      due = now + journal->settings.commit_ns;
      commit (journal);
    } else if (journal->stopping)
      break;
    else {
      if (now >= due)
        due = now + journal->settings.commit_ns;
      wait_until (&journal->work_for_committer, &journal->lock, due);
    }
  }
  pthread_mutex_unlock (&journal->lock);
  return NULL;
}

/* --- the keeper ------------------------------------------------------------------------------------------------- */

static bool
is_due (const struct journal *journal, int64_t now)
{
  const struct segment *segment = journal->current;

  return segment->entries > 0
         && (journal->rotation_wanted || segment->tail >= journal->settings.segment_size
             || segment->entries >= ENTRIES_MOST * 3 / 4 || journal->seal_wanted >= segment->first
             || now - segment->born >= journal->settings.age_ns);
}

/* A new segment becomes the current one. As extend. False: there is no file for it. */
static bool
rotate (struct journal *journal)
{
  const uint64_t floor = journal->last + 1;
  struct segment *segment = NULL;
  struct spare spare;
  int result, error;

  journal->rotation_wanted = false; /* also when nothing comes of it: then whoever waits gives up */
  if (need_spare (journal) == 0) {
    spare = journal->spare;
    pthread_mutex_unlock (&journal->lock);
    segment = segment_begin (journal->folder, &spare, &journal->origin, floor);
    keep_errno (pthread_mutex_lock (&journal->lock));
  }
  if (segment == NULL) {
    if (errno != ENOSPC && errno != EDQUOT)
      journal_fail (journal, errno, "making a segment");
    return false;
  }
  journal->spare.fd = -1;
  journal->journal_bytes += segment->tail + sizeof (struct segment_footer);
  if (journal->current != NULL)
    journal->current->next = segment;
  else
    journal->oldest = segment;
  journal->current = segment;
  /* At once: until it has been extended others write to it, and a write that fails for want of space is a hole. */
  journal->no_room = segment->room < journal->settings.segment_size;
  pthread_cond_broadcast (&journal->rotated);
  segment->floor = journal->last + 1;
  pthread_mutex_unlock (&journal->lock);
  /* While the file was made others may have got the number it was named for. */
  result = segment_rename_open (journal->folder, segment);
  error = result == -1 ? errno : 0;
  segment_spare (journal->folder, &spare);
  pthread_mutex_lock (&journal->lock);
  journal->spare = spare;
  if (error != 0)
    journal_fail (journal, error, "naming a segment");
  extend_both (journal);
  return true;
}

int
remember_sealed (struct journal *journal, const struct segment *segment, uint64_t bytes)
{
  if (journal->n_sealed == journal->sealed_room) {
    size_t room = journal->sealed_room * 2 + 64;
    struct sealed *more = realloc (journal->sealed, room * sizeof *more);
    if (more == NULL)
      return -1;
    journal->sealed = more;
    journal->sealed_room = room;
  }
  journal->sealed[journal->n_sealed++] = (struct sealed){ segment->first, segment->last, bytes };
  journal->sealed_bytes += bytes;
  return 0;
}

/* Seal the oldest segment, which nobody writes to any more. As rotate. False: try again later. */
static bool
seal_oldest (struct journal *journal)
{
  struct segment *segment = journal->oldest;
  uint64_t bytes;
  int result;

  pthread_mutex_unlock (&journal->lock);
  result = segment_seal (journal->folder, segment, &bytes);
  keep_errno (pthread_mutex_lock (&journal->lock));
  if (result == 0)
    result = remember_sealed (journal, segment, bytes);
  if (result == -1) {
    if (errno != ENOSPC && errno != EDQUOT)
      journal_fail (journal, errno, "sealing a segment");
    return false;
  }
  /* Sealing has synced it: what the committer has not reached yet is durable by this. */
  while (segment->syncing > 0)
    pthread_cond_wait (&journal->work_for_keeper, &journal->lock);
  journal->sealed_upto = segment->last;
  journal->oldest = segment->next;
  now_durable (journal, segment->last, now_ns (CLOCK_MONOTONIC));
  segment_free (segment);
  return true;
}

static bool
keep (struct journal *journal)
{
  struct segment *oldest = journal->oldest;

  if (oldest != journal->current && oldest->writing == 0 && !journal->rotation_wanted)
    return seal_oldest (journal);
  if (is_due (journal, now_ns (CLOCK_MONOTONIC)))
    return rotate (journal);
  extend_both (journal);
  return !journal->no_room && journal->state != STATE_FULL;
}

static bool
has_work (const struct journal *journal, int64_t now)
{
  return (journal->oldest != journal->current && journal->oldest->writing == 0) || is_due (journal, now)
         || journal->no_room || journal->state == STATE_FULL;
}

static void *
keeper (void *argument)
{
  struct journal *journal = argument;
  int64_t not_before = 0;

  pthread_mutex_lock (&journal->lock);
  while (!journal->stopping && journal->state != STATE_FAILED) {
    const int64_t now = now_ns (CLOCK_MONOTONIC);

    if ((now >= not_before || journal->rotation_wanted) && has_work (journal, now))
      not_before = keep (journal) ? 0 : now_ns (CLOCK_MONOTONIC) + RETRY_NS;
    else
      wait_until (&journal->work_for_keeper, &journal->lock, now + RETRY_NS / 4);
  }
  pthread_mutex_unlock (&journal->lock);
  return NULL;
}

/* --- from outside ----------------------------------------------------------------------------------------------- */

int
journal_start (struct journal *journal)
{
  sigset_t all, before;
  int error;

  /* nbdkit's own threads take the signals. */
  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &before);
  error = pthread_create (&journal->committer, NULL, committer, journal);
  if (error == 0) {
    error = pthread_create (&journal->keeper, NULL, keeper, journal);
    if (error == 0)
      journal->running = true;
    else
      nbdkit_error ("pthread_create: %s", strerror (error));
  } else
    nbdkit_error ("pthread_create: %s", strerror (error));
  pthread_sigmask (SIG_SETMASK, &before, NULL);
  return error == 0 ? 0 : -1;
}

void
journal_stop (struct journal *journal)
{
  if (!journal->running)
    return;
  pthread_mutex_lock (&journal->lock);
  journal->stopping = true;
  pthread_cond_broadcast (&journal->work_for_committer);
  pthread_cond_broadcast (&journal->work_for_keeper);
  pthread_mutex_unlock (&journal->lock);
  pthread_join (journal->keeper, NULL);
  pthread_join (journal->committer, NULL);
  journal->running = false;
}

void
journal_free (struct journal *journal)
{
  while (journal->oldest != NULL) {
    struct segment *segment = journal->oldest;
    journal->oldest = segment->next;
    segment_free (segment);
  }
  free (journal->sealed);
  if (journal->wake_control >= 0)
    close (journal->wake_control);
  if (journal->spare.fd >= 0)
    close (journal->spare.fd);
  close (journal->lock_file);
  close (journal->folder);
}

size_t
journal_forget (struct journal *journal, uint64_t upto, uint64_t *bytes)
{
  char name[NAME_ROOM];
  size_t n = 0;

  *bytes = 0;
  for (;;) {
    struct sealed sealed;

    pthread_mutex_lock (&journal->lock);
    if (journal->n_sealed == 0 || journal->sealed[0].last > upto) {
      look_whether_full (journal);
      pthread_cond_signal (&journal->work_for_keeper);
      pthread_mutex_unlock (&journal->lock);
      return n;
    }
    sealed = journal->sealed[0];
    pthread_mutex_unlock (&journal->lock);

    /* Only this thread takes from the front, and a file is gone before its space counts as free. */
    snprintf (name, sizeof name, "%020" PRIu64 "-%020" PRIu64 SUFFIX_SEALED, sealed.first, sealed.last);
    if (unlinkat (journal->folder, name, 0) == -1 && errno != ENOENT)
      nbdkit_error ("%s/%s: cannot delete: %m", journal->settings.spool, name);

    pthread_mutex_lock (&journal->lock);
    memmove (journal->sealed, journal->sealed + 1, --journal->n_sealed * sizeof *journal->sealed);
    journal->sealed_bytes -= sealed.bytes;
    pthread_mutex_unlock (&journal->lock);
    n++;
    *bytes += sealed.bytes;
  }
}

static int
init_locks (struct journal *journal)
{
  pthread_condattr_t monotonic;

  return pthread_condattr_init (&monotonic) || pthread_condattr_setclock (&monotonic, CLOCK_MONOTONIC)
         || pthread_mutex_init (&journal->lock, NULL) || pthread_cond_init (&journal->progress, NULL)
         || pthread_cond_init (&journal->work_for_committer, &monotonic)
         || pthread_cond_init (&journal->work_for_keeper, &monotonic)
         || pthread_cond_init (&journal->rotated, &monotonic);
}

int
journal_open (struct journal *journal)
{
  bool made;

  crc32c_init ();
  journal->origin.session = now_ns (CLOCK_REALTIME);
  if (init_locks (journal)) {
    nbdkit_error ("cannot make locks");
    return -1;
  }
  if (recover (journal) == -1)
    return -1;
  journal->spare.fd = -1;
  /* Nobody else is there yet, but what it calls lets the lock go. */
  pthread_mutex_lock (&journal->lock);
  made = rotate (journal);
  pthread_mutex_unlock (&journal->lock);
  if (!made && journal->state != STATE_FAILED)
    nbdkit_error ("%s: no space for a segment", journal->settings.spool);
  return made && journal->state == STATE_OK ? 0 : -1;
}
