/* Clock, whole reads and writes: what the C library leaves to its callers. */
#ifndef REWIND_JOURNAL_IO_H
#define REWIND_JOURNAL_IO_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Run a statement that must not disturb errno. */
#define keep_errno(statement) \
  do {                        \
    int kept_ = errno;        \
    statement;                \
    errno = kept_;            \
  } while (0)

static inline int64_t
now_ns (clockid_t clock)
{
  struct timespec now;

  clock_gettime (clock, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* All of both pieces, one behind the other, at `offset`. -1 and errno: any part may have been written. */
static inline int
pwrite_both (int fd, const void *head, size_t head_length, const void *body, size_t body_length, uint64_t offset)
{
  struct iovec pieces[2] = { { (void *)head, head_length }, { (void *)body, body_length } };

  while (pieces[0].iov_len + pieces[1].iov_len > 0) {
    ssize_t done = pwritev (fd, pieces, 2, (off_t)offset);
    if (done == -1 && errno == EINTR)
      continue;
    if (done <= 0) {
      if (done == 0)
        errno = ENOSPC;
      return -1;
    }
    offset += (uint64_t)done;
    for (int n = 0; n < 2; n++) {
      size_t part = (size_t)done < pieces[n].iov_len ? (size_t)done : pieces[n].iov_len;
      pieces[n].iov_base = (char *)pieces[n].iov_base + part;
      pieces[n].iov_len -= part;
      done -= (ssize_t)part;
    }
  }
  return 0;
}

/* Exactly `length` bytes. -1 and errno, EBADMSG when the file ends before. */
static inline int
pread_full (int fd, void *buffer, size_t length, uint64_t offset)
{
  char *to = buffer;

  while (length > 0) {
    ssize_t done = pread (fd, to, length, (off_t)offset);
    if (done == -1 && errno == EINTR)
      continue;
    if (done == -1)
      return -1;
    if (done == 0) {
      errno = EBADMSG;
      return -1;
    }
    to += done;
    length -= (size_t)done;
    offset += (uint64_t)done;
  }
  return 0;
}

#endif
