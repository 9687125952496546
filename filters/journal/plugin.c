/* nbdkit plugin `journal`: the far end of a tap. Manual: nbdkit-journal-plugin(1); format: appliance/journal/FORMAT.md.
 *
 * This file is nbdkit's view of it: parameters, exports, requests. The table of callbacks is at the end.
 */
#define _GNU_SOURCE
#include "control.h"
#include "io.h"
#include "journal.h"

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

#define DISKS_MOST 256
#define REQUEST_MOST (32u << 20)

struct handle {
  uint16_t disk;
  /* Once a request of this connection was refused, later ones must not get in: there is a hole in what it copies. Only
   * ever set, and by whoever is refused first, so it needs no lock.
   */
  int broken; /* errno */
};

static struct segment_disk disks[DISKS_MOST];
static char *control;
static struct journal journal = {
  .settings = {
    .commit_ns = 200000000,
    .age_ns = 60000000000,
    .segment_size = 64 << 20,
    .spool_limit = UINT64_MAX,
  },
  .origin = { .disks = disks },
  .wake_control = -1,
};

/* --- parameters ------------------------------------------------------------------------------------------------- */

static int
parse_duration (const char *key, const char *value, int64_t least, int64_t most, int64_t *ns)
{
  static const struct { const char *unit; double ns; } UNITS[]
    = { { "ms", 1e6 }, { "s", 1e9 }, { "", 1e9 }, { "m", 60e9 }, { "h", 3600e9 } };
  char *end;
  double number = strtod (value, &end);

  if (end != value && value[0] >= '0' && value[0] <= '9')
    for (size_t n = 0; n < sizeof UNITS / sizeof *UNITS; n++)
      if (strcmp (end, UNITS[n].unit) == 0 && number * UNITS[n].ns >= (double)least
          && number * UNITS[n].ns <= (double)most) {
        *ns = (int64_t)(number * UNITS[n].ns);
        return 0;
      }
  nbdkit_error ("%s=%s: not a duration from %g ms to %g s", key, value, (double)least / 1e6, (double)most / 1e9);
  return -1;
}

static int
parse_bytes (const char *key, const char *value, uint64_t least, uint64_t most, uint64_t *bytes)
{
  int64_t number = nbdkit_parse_size (value);

  if (number == -1)
    return -1;
  if ((uint64_t)number < least || (uint64_t)number > most) {
    nbdkit_error ("%s=%s: not from %llu to %llu bytes", key, value, (unsigned long long)least,
                  (unsigned long long)most);
    return -1;
  }
  *bytes = (uint64_t)number;
  return 0;
}

static int
find_disk (const char *name)
{
  for (int n = 0; n < journal.origin.n_disks; n++)
    if (strcmp (disks[n].name, name) == 0)
      return n;
  return -1;
}

static int
add_disk (const char *value)
{
  static const char LEGAL[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
  const size_t length = strspn (value, LEGAL);
  struct segment_disk disk = { .size = 0 };

  if (length == 0 || length >= DISK_NAME || value[length] != ':') {
    nbdkit_error ("disk=%s: not NAME:SIZE with a name of 1 to %d letters, digits, dots, dashes, underscores", value,
                  DISK_NAME - 1);
    return -1;
  }
  memcpy (disk.name, value, length);
  if (parse_bytes ("disk", value + length + 1, 0, INT64_MAX, &disk.size) == -1)
    return -1;
  if (find_disk (disk.name) != -1 || journal.origin.n_disks == DISKS_MOST) {
    nbdkit_error ("disk=%s: named twice, or more than %d disks", value, DISKS_MOST);
    return -1;
  }
  disks[journal.origin.n_disks++] = disk;
  return 0;
}

static int
set_path (char **path, const char *value)
{
  free (*path);
  /* nbdkit changes to / when it goes into the background. */
  *path = nbdkit_absolute_path (value);
  return *path == NULL ? -1 : 0;
}

static int
journal_config (const char *key, const char *value)
{
  struct settings *settings = &journal.settings;

  if (strcmp (key, "spool") == 0)
    return set_path (&settings->spool, value);
  if (strcmp (key, "disk") == 0)
    return add_disk (value);
  if (strcmp (key, "control") == 0)
    return set_path (&control, value);
  if (strcmp (key, "commit") == 0)
    return parse_duration (key, value, 1000000, 60000000000, &settings->commit_ns);
  if (strcmp (key, "segment-age") == 0)
    return parse_duration (key, value, 100000000, 86400000000000, &settings->age_ns);
  if (strcmp (key, "segment-size") == 0)
    return parse_bytes (key, value, 64 << 10, (uint64_t)2 << 30, &settings->segment_size);
  if (strcmp (key, "spool-limit") == 0)
    return parse_bytes (key, value, 1 << 20, INT64_MAX, &settings->spool_limit);
  nbdkit_error ("unknown parameter '%s'", key);
  return -1;
}

#define journal_config_help                                                                   \
  "spool=DIR         (required) Folder of the segments.\n"                                    \
  "disk=NAME:SIZE    (required) A disk, exported by its name. May be repeated.\n"             \
  "control=SOCKET               Control socket, see the manual.\n"                            \
  "commit=DURATION              Longest time until a record is durable (default 200ms).\n"    \
  "segment-size=SIZE            A segment is sealed at this size (default 64M),\n"            \
  "segment-age=DURATION         or at this age (default 60s).\n"                              \
  "spool-limit=SIZE             Requests beyond it get ENOSPC (default: none)."

static int
journal_config_complete (void)
{
  if (journal.settings.spool == NULL || journal.origin.n_disks == 0) {
    nbdkit_error ("parameters spool=DIR and disk=NAME:SIZE are missing");
    return -1;
  }
  return 0;
}

static void
journal_dump_plugin (void)
{
  printf ("journal_format=%d\n", FORMAT_VERSION);
}

/* --- life ------------------------------------------------------------------------------------------------------- */

/* The kernel's id of this boot: monotonic times of two boots cannot be compared. Zero where it does not tell. */
static void
read_boot_id (uint8_t id[16])
{
  char text[37] = "";
  int fd = open ("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
  int digits = 0;

  if (fd >= 0 && pread_full (fd, text, 36, 0) == 0)
    for (const char *p = text; *p != 0 && digits < 32; p++)
      if (*p != '-') {
        id[digits / 2] = (uint8_t)(id[digits / 2] << 4 | (*p <= '9' ? *p - '0' : (*p | 0x20) - 'a' + 10));
        digits++;
      }
  if (fd >= 0)
    close (fd);
}

/* nbdkit asks for SIGTERM at its parent's death, whatever was asked for before: a journal that is stopped or hangs would
   outlive whoever watches it, with a guest waiting. The parent says what it wants (appliance/nbdkit.py). */
static void
settle_parents_death (void)
{
  const char *number = getenv ("REWIND_PARENT_DIED");
  if (number != NULL && prctl (PR_SET_PDEATHSIG, atoi (number)) == -1)
    nbdkit_debug ("prctl: %m");
}

static int
journal_get_ready (void)
{
  settle_parents_death ();
  read_boot_id (journal.origin.boot);
  journal.disks = calloc (journal.origin.n_disks, sizeof *journal.disks);
  if (journal.disks == NULL) {
    nbdkit_error ("calloc: %m");
    return -1;
  }
  /* Recovery before the fork, so that its errors are seen where nbdkit was started. */
  if (journal_open (&journal) == -1)
    return -1;
  return control != NULL ? control_open (&journal, control) : 0;
}

static int
journal_after_fork (void)
{
  return journal_start (&journal) == -1 ? -1 : control_start ();
}

static void
journal_cleanup (void)
{
  control_stop ();
  journal_stop (&journal);
}

/* --- exports ---------------------------------------------------------------------------------------------------- */

static int
journal_list_exports (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  (void)readonly;
  (void)is_tls;
  for (int n = 0; n < journal.origin.n_disks; n++)
    if (nbdkit_add_export (exports, disks[n].name, NULL) == -1)
      return -1;
  return 0;
}

static void *
journal_open_export (int readonly)
{
  const char *name = nbdkit_export_name ();
  const int disk = name != NULL ? find_disk (name) : -1;
  struct handle *handle;

  (void)readonly;
  if (disk == -1) {
    nbdkit_error ("no disk '%s' in this journal", name != NULL ? name : "");
    return NULL;
  }
  handle = calloc (1, sizeof *handle);
  if (handle == NULL)
    nbdkit_error ("calloc: %m");
  else
    handle->disk = (uint16_t)disk;
  return handle;
}

static void
journal_close (void *handle)
{
  free (handle);
}

static int64_t
journal_get_size (void *handle)
{
  return (int64_t)disks[((struct handle *)handle)->disk].size;
}

static int
journal_block_size (void *handle, uint32_t *least, uint32_t *preferred, uint32_t *most)
{
  (void)handle;
  /* A client that may write single bytes never has to read to write. */
  *least = 1;
  *preferred = 4096;
  *most = REQUEST_MOST;
  return 0;
}

static int
yes (void *handle)
{
  (void)handle;
  return 1;
}

static int
journal_can_fua (void *handle)
{
  (void)handle;
  return NBDKIT_FUA_NATIVE;
}

/* --- requests --------------------------------------------------------------------------------------------------- */

static int
append (void *opaque, enum kind kind, uint32_t count, uint64_t offset, const void *data, uint32_t flags)
{
  struct handle *handle = opaque;
  const uint8_t recorded
    = (uint8_t)((flags & NBDKIT_FLAG_FUA ? FLAG_FUA : 0) | (flags & NBDKIT_FLAG_MAY_TRIM ? FLAG_MAY_TRIM : 0));
  int error = __atomic_load_n (&handle->broken, __ATOMIC_RELAXED);

  if (error == 0) {
    if (journal_append (&journal, kind, handle->disk, offset, count, data, recorded, NULL) == 0)
      return 0;
    error = errno;
    __atomic_store_n (&handle->broken, error, __ATOMIC_RELAXED);
  }
  journal_lost (&journal, handle->disk, offset, count);
  nbdkit_set_error (error);
  return -1;
}

static int
journal_pwrite (void *handle, const void *data, uint32_t count, uint64_t offset, uint32_t flags)
{
  return append (handle, KIND_WRITE, count, offset, data, flags);
}

static int
journal_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  return append (handle, KIND_ZERO, count, offset, NULL, flags);
}

static int
journal_trim (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  return append (handle, KIND_TRIM, count, offset, NULL, flags);
}

static int
journal_flush_export (void *handle, uint32_t flags)
{
  (void)handle;
  (void)flags;
  if (journal_flush (&journal) == 0)
    return 0;
  nbdkit_set_error (errno);
  return -1;
}

static int
journal_pread (void *handle, void *buffer, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void)handle;
  (void)buffer;
  (void)count;
  (void)offset;
  (void)flags;
  /* Zeroes would be a lie that a client could write back over good data. */
  nbdkit_error ("a journal cannot be read through NBD");
  nbdkit_set_error (EIO);
  return -1;
}

static struct nbdkit_plugin plugin = {
  .name = "journal",
  .longname = "Rewind journal",
  .description = "Records every write of the disks of a domain, in one order",
  .config = journal_config,
  .config_complete = journal_config_complete,
  .config_help = journal_config_help,
  .dump_plugin = journal_dump_plugin,
  .get_ready = journal_get_ready,
  .after_fork = journal_after_fork,
  .cleanup = journal_cleanup,
  .list_exports = journal_list_exports,
  .open = journal_open_export,
  .close = journal_close,
  .get_size = journal_get_size,
  .block_size = journal_block_size,
  .can_write = yes,
  .can_flush = yes,
  .can_trim = yes,
  .can_zero = yes,
  .can_fast_zero = yes,
  .can_fua = journal_can_fua,
  .can_multi_conn = yes,
  .pread = journal_pread,
  .pwrite = journal_pwrite,
  .zero = journal_zero,
  .trim = journal_trim,
  .flush = journal_flush_export,
  .errno_is_preserved = 0,
};

NBDKIT_REGISTER_PLUGIN (plugin)
