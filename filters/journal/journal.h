/* The journal of one domain: records of all disks in one order.
 *
 *   a write      lock: sequence number, place, time    →  sum and pwritev without the lock  →  lock: it is written
 *   committer    every `commit`: fdatasync; everything before the oldest unfinished record is durable then
 *   keeper       seals what is full or old, makes the next segment; the only thread that makes or renames files
 *
 *   sequence   1 … sealed … durable … written … last         each ≤ the next
 *                          └ on the disk  └ in the kernel, without a hole
 */
#ifndef REWIND_JOURNAL_JOURNAL_H
#define REWIND_JOURNAL_JOURNAL_H

#include "queue.h"
#include "segment.h"

#include <pthread.h>

/* Latencies: four steps for each power of two of microseconds, from below 1 µs to above 16 s. */
#define LATENCY_STEPS 100

enum state {
  STATE_OK,
  STATE_FULL,   /* the last record found no space; goes on by itself when `forget` made some */
  STATE_FAILED, /* a write or sync failed: there is a hole, and nothing may follow it. Final. */
};

struct settings {
  char *spool;
  int64_t commit_ns;
  int64_t age_ns;
  uint64_t segment_size;
  uint64_t spool_limit; /* UINT64_MAX: none */
};

struct disk_counters {
  uint64_t records, bytes, refused;
  bool lost; /* a record of it was refused and none has been taken since */
};

/* What failed for want of space is tried again after this. */
#define RETRY_NS 200000000

struct sealed {
  uint64_t first, last, bytes;
};

struct journal {
  struct settings settings;
  struct origin origin;
  int folder; /* the spool */
  int lock_file;

  pthread_mutex_t lock; /* for everything below */
  pthread_cond_t work_for_committer;
  pthread_cond_t work_for_keeper;
  pthread_cond_t rotated; /* another segment is the current one */
  pthread_cond_t progress; /* durable, sealed or state changed */

  enum state state;
  int error; /* errno of STATE_FAILED */
  bool stopping;
  uint64_t last, durable, sealed_upto;
  uint64_t wanted;       /* somebody waits for this to be durable */
  uint64_t seal_wanted;  /* somebody waits for this to be sealed */
  uint64_t hole;         /* of the records whose writing failed, the first; 0: none */
  struct segment *oldest, *current; /* unsealed, a list */
  struct spare spare;
  bool no_room;          /* the current segment did not get all its room */
  bool rotation_wanted;  /* a writer waits for the next segment */
  int64_t no_room_until; /* a writer need not ask for more before that */
  struct queue unfinished; /* have a place */
  struct queue placeless;  /* wait for room in the segment */
  struct sealed *sealed;
  size_t n_sealed, sealed_room;
  uint64_t sealed_bytes;
  int wake_control;      /* eventfd, written at progress */

  struct disk_counters *disks;
  uint64_t records, payload, journal_bytes, marks, fsyncs;
  int64_t fsync_total, fsync_longest, undurable_since;
  uint64_t latency[LATENCY_STEPS];
  int64_t latency_longest;
  struct {
    uint64_t records, segments, cut;
  } recovered;

  pthread_t committer, keeper;
  bool running;
};

/* With the lock held: nothing is taken any more; told once. */
void journal_fail (struct journal *journal, int error, const char *what);
/* Until it is signalled, or that time of CLOCK_MONOTONIC in nanoseconds has come. */
void wait_until (pthread_cond_t *condition, pthread_mutex_t *lock, int64_t when);

/* With the lock held: since when the oldest record waits to be written; 0: none does. */
int64_t journal_waiting_since (const struct journal *journal);

/* Lock the spool, recover what an earlier process left, begin a new segment. Errors are reported to nbdkit; -1 then. */
int journal_open (struct journal *journal);
/* Begin the threads: after the fork. -1: reported. */
int journal_start (struct journal *journal);
/* Everything recorded so far durable, threads ended. The open segment stays as it is: the next start seals it. */
void journal_stop (struct journal *journal);

/* Give back what it holds, the lock of the spool too: for programs that go on. */
void journal_free (struct journal *journal);

/* Take one record. 0 when it is in the kernel (with FLAG_FUA: durable); else -1 and errno: ENOSPC when there is no
 * space, which leaves the journal without a hole, any other when it has failed. Any thread.
 */
int journal_append (struct journal *journal, enum kind kind, uint16_t disk, uint64_t offset, uint32_t length,
                    const void *payload, uint8_t flags, uint64_t *sequence);

/* Note that a request of a disk was refused. Never fails: what cannot be recorded is counted. */
void journal_lost (struct journal *journal, uint16_t disk, uint64_t offset, uint32_t length);

/* Wait until everything recorded so far is durable. -1 and errno when the journal failed. */
int journal_flush (struct journal *journal);

/* Ask for durable, sealed; who asks looks at `durable`, `sealed_upto` later. Returns the sequence number meant. */
uint64_t journal_ask_durable (struct journal *journal);
uint64_t journal_ask_sealed (struct journal *journal);

/* Delete sealed segments that end at or before `upto`. Returns how many; `*bytes` is what they took. */
/* From one thread. */
size_t journal_forget (struct journal *journal, uint64_t upto, uint64_t *bytes);

/* With the lock held. */
int remember_sealed (struct journal *journal, const struct segment *segment, uint64_t bytes);
uint64_t journal_written (const struct journal *journal);
uint64_t journal_used (const struct journal *journal);
uint64_t latency_below_us (int step);

#endif
