/* Answers of the control socket. The lock is held only to copy numbers: never while text is made. */
#define _GNU_SOURCE
#include "answer.h"

#include "io.h"
#include "journal.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__ ((format (printf, 2, 3))) static void
put (struct answer *answer, const char *format, ...)
{
  const size_t room = sizeof answer->text - answer->length;
  va_list arguments;
  int length;

  va_start (arguments, format);
  length = vsnprintf (answer->text + answer->length, room, format, arguments);
  va_end (arguments);
  answer->length += length < 0 ? 0 : (size_t)length < room ? (size_t)length : room - 1;
}

static void
comma (struct answer *answer)
{
  const char last = answer->text[answer->length - 1];

  if (last != '{' && last != '[')
    put (answer, ", ");
}

static void
quote (struct answer *answer, const char *value)
{
  put (answer, "\"");
  for (; *value != 0; value++)
    put (answer, *value == '"' || *value == '\\' ? "\\%c" : (unsigned char)*value < 0x20 ? "?" : "%c", *value);
  put (answer, "\"");
}

void
answer_begin (struct answer *answer)
{
  answer->length = 0;
  put (answer, "{");
}

void
answer_end (struct answer *answer)
{
  put (answer, "}\n");
}

static void
name (struct answer *answer, const char *text)
{
  comma (answer);
  put (answer, "\"%s\": ", text);
}

void
answer_text (struct answer *answer, const char *field, const char *value)
{
  name (answer, field);
  quote (answer, value);
}

void
answer_number (struct answer *answer, const char *field, uint64_t value)
{
  name (answer, field);
  put (answer, "%" PRIu64, value);
}

/* --- status ----------------------------------------------------------------------------------------------------- */

static const char *const STATES[] = { "ok", "full", "failed" };

static void
put_disk (struct answer *answer, const struct segment_disk *disk, const struct disk_counters *counters)
{
  comma (answer);
  put (answer, "{");
  answer_text (answer, "name", disk->name);
  answer_number (answer, "size", disk->size);
  answer_number (answer, "records", counters->records);
  answer_number (answer, "bytes", counters->bytes);
  answer_number (answer, "refused", counters->refused);
  put (answer, "}");
}

static uint64_t
age_us (int64_t since, int64_t now)
{
  return since == 0 || now < since ? 0 : (uint64_t)(now - since) / 1000;
}

static void
put_positions (struct answer *answer, const struct journal *journal, uint64_t written)
{
  answer_number (answer, "last", journal->last);
  answer_number (answer, "written", written);
  answer_number (answer, "durable", journal->durable);
  answer_number (answer, "sealed", journal->sealed_upto);
}

void
answer_status (struct answer *answer, struct journal *journal)
{
  struct disk_counters *disks = malloc (journal->origin.n_disks * sizeof *disks);
  const int64_t now = now_ns (CLOCK_MONOTONIC);
  struct journal copy;
  uint64_t written, used, first;
  int64_t oldest;

  if (disks == NULL)
    abort (); /* a few hundred bytes */
  pthread_mutex_lock (&journal->lock);
  copy = *journal;
  memcpy (disks, journal->disks, journal->origin.n_disks * sizeof *disks);
  written = journal_written (journal);
  used = journal_used (journal);
  oldest = journal_waiting_since (journal);
  first = journal->n_sealed > 0 ? journal->sealed[0].first : journal->oldest->floor;
  pthread_mutex_unlock (&journal->lock);

  answer_begin (answer);
  answer_text (answer, "state", STATES[copy.state]);
  answer_text (answer, "reason", copy.state == STATE_FAILED ? strerror (copy.error)
               : copy.state == STATE_FULL ? "no space in the spool" : "");
  name (answer, "journal");
  put (answer, "\"");
  for (int n = 0; n < 16; n++)
    put (answer, "%02x", copy.origin.journal[n]);
  put (answer, "\"");
  answer_number (answer, "session", (uint64_t)copy.origin.session);
  answer_number (answer, "first", first);
  put_positions (answer, &copy, written);
  answer_number (answer, "segments", copy.n_sealed);
  answer_number (answer, "bytes", used);
  answer_number (answer, "limit", copy.settings.spool_limit == UINT64_MAX ? 0 : copy.settings.spool_limit);
  answer_number (answer, "undurable_us", age_us (copy.undurable_since, now));
  answer_number (answer, "unfinished_us", age_us (oldest, now));
  answer_number (answer, "recovered_records", copy.recovered.records);
  answer_number (answer, "recovered_segments", copy.recovered.segments);
  answer_number (answer, "cut_bytes", copy.recovered.cut);
  name (answer, "disks");
  put (answer, "[");
  for (uint16_t n = 0; n < copy.origin.n_disks; n++)
    put_disk (answer, &copy.origin.disks[n], &disks[n]);
  put (answer, "]");
  answer_end (answer);
  free (disks);
}

/* --- stats ------------------------------------------------------------------------------------------------------ */

/* The upper bound of the step that this share of all requests does not exceed. */
static uint64_t
quantile (const struct journal *journal, uint64_t total, double share)
{
  uint64_t seen = 0;

  for (int step = 0; step < LATENCY_STEPS; step++) {
    seen += journal->latency[step];
    if (total > 0 && (double)seen >= share * (double)total)
      return latency_below_us (step);
  }
  return 0;
}

static void
put_latency (struct answer *answer, const struct journal *journal)
{
  uint64_t total = 0;

  for (int step = 0; step < LATENCY_STEPS; step++)
    total += journal->latency[step];
  name (answer, "latency");
  put (answer, "{");
  answer_number (answer, "count", total);
  answer_number (answer, "p50_us", quantile (journal, total, 0.5));
  answer_number (answer, "p99_us", quantile (journal, total, 0.99));
  answer_number (answer, "longest_us", (uint64_t)journal->latency_longest / 1000);
  name (answer, "histogram");
  put (answer, "[");
  for (int step = 0; step < LATENCY_STEPS; step++)
    if (journal->latency[step] > 0) {
      comma (answer);
      put (answer, "[%" PRIu64 ", %" PRIu64 "]", latency_below_us (step), journal->latency[step]);
    }
  put (answer, "]}");
}

void
answer_stats (struct answer *answer, struct journal *journal)
{
  struct journal copy;
  uint64_t written;

  pthread_mutex_lock (&journal->lock);
  copy = *journal;
  written = journal_written (journal);
  pthread_mutex_unlock (&journal->lock);

  answer_begin (answer);
  answer_number (answer, "records", copy.records);
  answer_number (answer, "bytes", copy.payload);
  answer_number (answer, "journal_bytes", copy.journal_bytes);
  answer_number (answer, "marks", copy.marks);
  put_positions (answer, &copy, written);
  answer_number (answer, "fsyncs", copy.fsyncs);
  answer_number (answer, "fsync_us", copy.fsyncs > 0 ? (uint64_t)copy.fsync_total / copy.fsyncs / 1000 : 0);
  answer_number (answer, "fsync_longest_us", (uint64_t)copy.fsync_longest / 1000);
  put_latency (answer, &copy);
  answer_end (answer);
}
