/* Answers of the control socket: flat JSON in a buffer of fixed size. */
#ifndef REWIND_JOURNAL_ANSWER_H
#define REWIND_JOURNAL_ANSWER_H

#include <stddef.h>
#include <stdint.h>

struct journal;

/* 256 disks with names of 31 bytes fit. */
struct answer {
  char text[64 << 10];
  size_t length;
};

void answer_begin (struct answer *answer);
void answer_text (struct answer *answer, const char *name, const char *value);
void answer_number (struct answer *answer, const char *name, uint64_t value);
void answer_end (struct answer *answer);

void answer_status (struct answer *answer, struct journal *journal);
void answer_stats (struct answer *answer, struct journal *journal);

#endif
