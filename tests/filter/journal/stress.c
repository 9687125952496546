/* The journal without nbdkit: writers, flushes and control clients at once, then a restart, for sanitizers and valgrind.
 *
 *   stress SPOOL SOCKET WRITERS REQUESTS LIMIT
 *
 * Exit 0 when all went as it must. What it wrote is read by the Python side of the test.
 */
#define _GNU_SOURCE
#include "control.h"
#include "crc32c.h"
#include "io.h"
#include "journal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#define DISKS 3

/* What nbdkit would give. */
__attribute__ ((format (printf, 1, 2))) void nbdkit_error (const char *format, ...);
__attribute__ ((format (printf, 1, 2))) void nbdkit_debug (const char *format, ...);

void
nbdkit_error (const char *format, ...)
{
  va_list arguments;

  va_start (arguments, format);
  vfprintf (stderr, format, arguments);
  va_end (arguments);
  fputc ('\n', stderr);
}

void
nbdkit_debug (const char *format, ...)
{
  (void)format;
}

static struct journal journal;
static const struct segment_disk disks[DISKS] = { { "vda", 1 << 30 }, { "vdb", 1 << 30 }, { "vdc", 1 << 30 } };
static const char *control;
static int requests;

static void *
writer (void *argument)
{
  unsigned seed = (unsigned)(uintptr_t)argument;
  char *data = malloc (256 << 10);

  memset (data, (int)seed, 256 << 10);
  for (int n = 0; n < requests; n++) {
    const enum kind kind = rand_r (&seed) % 8 < 6 ? KIND_WRITE : rand_r (&seed) % 2 ? KIND_ZERO : KIND_TRIM;
    const uint16_t disk = (uint16_t)(rand_r (&seed) % DISKS);
    const uint64_t offset = (uint64_t)(rand_r (&seed) % 2000) * 4096;
    const uint32_t length = rand_r (&seed) % 8 ? 4096 : 1 + (uint32_t)rand_r (&seed) % (256 << 10);

    if (journal_append (&journal, kind, disk, offset, length, data, n % 50 == 0 ? FLAG_FUA : 0, NULL) == -1)
      journal_lost (&journal, disk, offset, length);
    if (n % 97 == 0)
      journal_flush (&journal);
  }
  free (data);
  return NULL;
}

static void *
client (void *argument)
{
  static const char *const LINES[] = { "status\n", "stats\n", "mark now\n", "seal\n", "rubbish \377\n", "forget 1\n", "\n" };
  unsigned seed = (unsigned)(uintptr_t)argument;
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  char answer[4096];

  strcpy (address.sun_path, control);
  for (int n = 0; n < requests / 20; n++) {
    int fd = socket (AF_UNIX, SOCK_STREAM, 0);

    if (connect (fd, (struct sockaddr *)&address, sizeof address) == 0)
      for (int k = rand_r (&seed) % 3; k >= 0; k--) {
        const char *line = LINES[(size_t)rand_r (&seed) % (sizeof LINES / sizeof *LINES)];

        if (send (fd, line, strlen (line), MSG_NOSIGNAL) == -1 || (rand_r (&seed) % 3 && recv (fd, answer, sizeof answer, 0) <= 0))
          break;
      }
    close (fd);
  }
  return NULL;
}

static int
life (int writers)
{
  pthread_t threads[64];
  int n = 0;

  if (journal_open (&journal) == -1 || control_open (&journal, control) == -1 || journal_start (&journal) == -1
      || control_start () == -1)
    return -1;
  for (; n < writers; n++)
    pthread_create (&threads[n], NULL, writer, (void *)(uintptr_t)(n + 1));
  for (; n < writers + 2; n++)
    pthread_create (&threads[n], NULL, client, (void *)(uintptr_t)(n + 1));
  while (n-- > 0)
    pthread_join (threads[n], NULL);
  control_stop ();
  journal_stop (&journal);
  return journal.state == STATE_FAILED || journal.durable != journal.last ? -1 : 0;
}

/* Both ways to sum, at every alignment and around the lengths where they change their pace. */
static int
sums_agree (void)
{
  static uint8_t data[16 << 10];
  unsigned seed = 1;

  crc32c_init ();
  for (size_t n = 0; n < sizeof data; n++)
    data[n] = (uint8_t)rand_r (&seed);
  for (int n = 0; n < 2000; n++) {
    const size_t length = (size_t)rand_r (&seed) % 9000, from = (size_t)rand_r (&seed) % 64;

    if (crc32c ((uint32_t)n, data + from, length) != crc32c_by_table ((uint32_t)n, data + from, length))
      return 0;
  }
  return crc32c (0, "123456789", 9) == 0xe3069283u;
}

int
main (int argc, char **argv)
{
  if (argc != 6 || !sums_agree ())
    return 2;
  control = argv[2];
  requests = atoi (argv[4]);
  for (int times = 0; times < 2; times++) {
    journal = (struct journal){
      .settings = {
        .spool = argv[1], .commit_ns = 20000000, .age_ns = 300000000, .segment_size = 1 << 20,
        .spool_limit = (uint64_t)atoll (argv[5]),
      },
      .origin = { .disks = disks, .n_disks = DISKS },
      .disks = calloc (DISKS, sizeof (struct disk_counters)),
      .wake_control = -1,
    };
    if (life (atoi (argv[3])) == -1)
      return 1;
    journal_free (&journal);
    free (journal.disks);
  }
  return 0;
}
