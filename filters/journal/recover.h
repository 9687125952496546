#ifndef REWIND_JOURNAL_RECOVER_H
#define REWIND_JOURNAL_RECOVER_H

struct journal;

/* Lock the spool, seal what an earlier process left open, cut at the first hole, set the sequence. -1: reported. */
int recover (struct journal *journal);

#endif
