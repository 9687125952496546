/* Room for records: what the file system has promised for the current segment and the one after it.
 *
 * No record ever lies past what is promised for its segment (`room`): a write that fails would leave a hole, behind which
 * nothing can be read. The keeper gets each segment its room before it is begun (`need_spare`), and more where it can
 * (`extend_both`); a writer who is ahead of him gets it himself (`need_room`).
 */
#define _GNU_SOURCE
#include "room.h"

#include "io.h"
#include "journal.h"

/* Kept free for marks and for the note that a disk lost a write: these must get in when nothing else does. */
#define RESERVE ((uint64_t)64 << 10)
/* A write waits this long for the next segment on a full disk: less than the shortest bound of a watchdog, 50 ms. */
#define ROTATION_NS 40000000

bool
has_space (const struct journal *journal, enum kind kind, uint64_t need)
{
  const struct segment *segment = journal->current;
  const bool data = kind <= KIND_TRIM;

  need += data ? RESERVE : 0;
  if (segment->entries + (data ? 1024 : 0) >= ENTRIES_MOST || segment->tail + need > SEGMENT_MOST)
    return false;
  /* Its index and footer must get in too, or it could not be sealed. Past what is promised a write may fail, and its
   * place in the journal would be a hole: see need_room.
   */
  if (segment_size (segment) + sizeof (struct index_entry) + need > segment->room)
    return false;
  return journal_used (journal) + need + sizeof (struct index_entry) <= journal->settings.spool_limit;
}

void
look_whether_full (struct journal *journal)
{
  if (journal->state == STATE_FULL && has_space (journal, KIND_WRITE, RESERVE))
    journal->state = STATE_OK;
}

/* On a full disk the next segment may have its room already: wait for it, but not for long, as a guest waits too. */
static void
await_rotation (struct journal *journal, const struct segment *segment, int64_t until)
{
  /* Of one without a record there is nothing to seal, so it is never followed by another. */
  while (journal->current == segment && segment->entries > 0 && journal->spare.fd != -1
         && journal->state != STATE_FAILED && journal->spare.room >= journal->settings.segment_size
         && now_ns (CLOCK_MONOTONIC) < until) {
    journal->rotation_wanted = true;
    pthread_cond_signal (&journal->work_for_keeper);
    wait_until (&journal->rotated, &journal->lock, until);
  }
  journal->rotation_wanted = false; /* or the keeper would seal nothing before it */
}

/* The file system's promise for more of a segment. The lock is held, and let go of meanwhile: the caller sees to it that
 * it is not sealed. -1: the promise is as it was.
 */
static int
get_room (struct journal *journal, struct segment *segment, uint64_t room)
{
  uint64_t promised = segment->room;
  int result;

  pthread_mutex_unlock (&journal->lock);
  result = segment_promise (segment->fd, room, &promised);
  keep_errno (pthread_mutex_lock (&journal->lock));
  if (promised > segment->room) /* somebody else may have got more */
    segment->room = promised;
  if (result == -1 && errno != ENOSPC && errno != EDQUOT)
    journal_fail (journal, errno, "making room in a segment");
  return result;
}

/* As much beyond `room` as keeps the next writers from asking too, within the limit; or else `room` alone. */
static int
get_ample_room (struct journal *journal, struct segment *segment, uint64_t room)
{
  const uint64_t left = journal->settings.spool_limit - journal_used (journal);
  const uint64_t more = journal->settings.segment_size / 8;

  if (more < left && get_room (journal, segment, room + more) == 0)
    return 0;
  return get_room (journal, segment, room);
}

/* Room for a record of which nothing is there yet. Usually the keeper has seen to it; writers may be ahead of him. What
 * cannot be had is a full disk, for a while. The lock is held, and let go of meanwhile; the watchdog sees that it waits.
 */
void
need_room (struct journal *journal, uint64_t need, struct unfinished *me)
{
  const int64_t begun = now_ns (CLOCK_MONOTONIC), until = begun + ROTATION_NS;
  struct segment *segment;
  uint64_t room;
  int result = 0;

  me->begun = begun;
  enqueue (&journal->placeless, me);
  while (result == 0 && journal->state != STATE_FAILED) {
    segment = journal->current;
    room = segment_size (segment) + sizeof (struct index_entry) + need + RESERVE;
    if (room <= segment->room || journal_used (journal) + need + RESERVE >= journal->settings.spool_limit
        || now_ns (CLOCK_MONOTONIC) < journal->no_room_until)
      break;
    segment->writing++; /* so that it is not sealed meanwhile */
    result = get_ample_room (journal, segment, room);
    if (result == -1)
      await_rotation (journal, segment, until);
    segment->writing--;
    if (segment != journal->current) {
      pthread_cond_signal (&journal->work_for_keeper);
      result = 0; /* there is another one to look at */
    }
  }
  dequeue (&journal->placeless, me);
  if (result == -1) {
    journal->no_room = true;
    journal->no_room_until = now_ns (CLOCK_MONOTONIC) + RETRY_NS;
  }
}

/* With the lock held: how far the current segment may reach. */
static uint64_t
room_wanted (const struct journal *journal)
{
  const uint64_t used = journal_used (journal), limit = journal->settings.spool_limit;
  const uint64_t most = journal->settings.segment_size + journal->settings.segment_size / 8 + SPARE_ROOM;
  const uint64_t left = journal->current->tail + (used < limit ? limit - used : 0);

  return most < left ? most : left;
}

/* Get more room for the current segment. The lock is held, and let go of meanwhile. */
static void
extend (struct journal *journal)
{
  struct segment *segment = journal->current;

  get_room (journal, segment, room_wanted (journal));
  journal->no_room = segment->room < journal->settings.segment_size;
  journal->no_room_until = 0;
  look_whether_full (journal);
}

/* Get the next segment all its room while nobody writes to it: a file system may hold the writers of a file up while it
 * looks for space, for 20 ms in memory. What it does not get now, `extend` asks for once more. As extend.
 */
static void
extend_spare (struct journal *journal)
{
  const uint64_t limit = journal->settings.spool_limit, current = journal->current->room - journal->current->tail;
  const uint64_t most = journal->settings.segment_size + journal->settings.segment_size / 8 + SPARE_ROOM;
  const uint64_t taken = journal_used (journal) + current, left = taken < limit ? limit - taken : 0;
  struct spare spare = journal->spare;

  if (spare.fd == -1)
    return;
  pthread_mutex_unlock (&journal->lock);
  segment_promise (spare.fd, most < left ? most : left, &spare.room);
  pthread_mutex_lock (&journal->lock);
  journal->spare = spare;
}

/* The current segment comes first: what little there is must not go to the next one. */
void
extend_both (struct journal *journal)
{
  extend (journal);
  if (!journal->no_room)
    extend_spare (journal);
}

/* There is a file for the next segment, with all its room if that is to be had. As extend; -1 and errno: none. */
int
need_spare (struct journal *journal)
{
  struct spare spare = journal->spare;
  int result = 0;

  if (spare.fd == -1) {
    pthread_mutex_unlock (&journal->lock);
    result = segment_spare (journal->folder, &spare);
    keep_errno (pthread_mutex_lock (&journal->lock));
    journal->spare = spare;
  }
  /* What was not to be had when the last one was begun may be now. */
  if (journal->current != NULL && journal->spare.room < journal->settings.segment_size)
    keep_errno (extend_spare (journal));
  return result;
}
