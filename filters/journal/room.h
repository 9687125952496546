#ifndef REWIND_JOURNAL_ROOM_H
#define REWIND_JOURNAL_ROOM_H

#include <stdbool.h>
#include <stdint.h>

#include "format.h"

struct journal;
struct unfinished;

/* All with the lock held; what may wait for the file system lets it go meanwhile. */

/* Whether a record of `need` bytes, header included, may get a place in the current segment. */
bool has_space (const struct journal *journal, enum kind kind, uint64_t need);
/* A journal that is full is not any more when there is space. */
void look_whether_full (struct journal *journal);

/* Of a writer that has no place yet: wait until `has_space` may be true of the current segment, or has been given up. */
void need_room (struct journal *journal, uint64_t need, struct unfinished *me);

/* Of the keeper. -1 and errno: there is no file for the next segment. */
int need_spare (struct journal *journal);
void extend_both (struct journal *journal);

#endif
