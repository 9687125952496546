/* A unix socket on which one line asks and one line of JSON answers. Nothing in here is waited for by a write. */
#ifndef REWIND_JOURNAL_CONTROL_H
#define REWIND_JOURNAL_CONTROL_H

struct journal;

/* Listen, mode 0600; a socket that nobody listens on any more is replaced. -1: reported. */
int control_open (struct journal *journal, const char *path);
/* Begin its thread: after the fork. -1: reported. */
int control_start (void);
void control_stop (void);

#endif
