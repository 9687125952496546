/* Records that are not written yet, in the order in which they came. Each lies on the stack of its writer. */
#ifndef REWIND_JOURNAL_QUEUE_H
#define REWIND_JOURNAL_QUEUE_H

#include <stddef.h>
#include <stdint.h>

/* A record that is not written yet, with its place (and then its number), or without. */
struct unfinished {
  struct unfinished *older, *newer;
  uint64_t sequence;
  int64_t begun;
};

struct queue {
  struct unfinished *oldest, *newest;
};

static inline void
enqueue (struct queue *queue, struct unfinished *me)
{
  me->newer = NULL;
  me->older = queue->newest;
  *(me->older ? &me->older->newer : &queue->oldest) = me;
  queue->newest = me;
}

static inline void
dequeue (struct queue *queue, struct unfinished *me)
{
  *(me->older ? &me->older->newer : &queue->oldest) = me->newer;
  *(me->newer ? &me->newer->older : &queue->newest) = me->older;
}

/* The least of them: who waited for room is behind elders that came after him. */
static inline int64_t
begun_first (const struct queue *queue, int64_t first)
{
  for (const struct unfinished *one = queue->oldest; one != NULL; one = one->newer)
    first = one->begun < first ? one->begun : first;
  return first;
}

#endif
