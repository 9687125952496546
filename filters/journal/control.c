/* The control socket: one thread, one poll loop, a fixed number of clients.
 *
 *   status | stats | mark LABEL | seal | forget UPTO        one line, at most LINE_MOST bytes
 *
 * `mark` and `seal` are answered when what they ask for has come true; other clients are served meanwhile. A client has
 * one request at a time: while it waits for an answer nothing more is read from it, so that a fast one costs no memory
 * and a slow reader only itself. When all places are taken, the client that was silent for longest makes room.
 */
#define _GNU_SOURCE
#include "control.h"

#include "answer.h"
#include "io.h"
#include "journal.h"

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#define CLIENTS 32
#define LINE_MOST 1024
#define LABEL_MOST 256

enum waiting { NOTHING, FOR_DURABLE, FOR_SEALED };

struct client {
  int fd; /* -1: free */
  int64_t heard;
  char line[LINE_MOST];
  size_t have;
  struct answer answer;
  size_t sent;
  enum waiting waiting;
  uint64_t sequence;     /* waited for */
  char mark[LABEL_MOST + 1];
  int64_t wall;
  bool leave;            /* close when the answer is sent */
};

static struct journal *journal;
static char *path;
static int listener = -1;
static pthread_t thread;
static bool running, stopping; /* stopping: under journal->lock */
static struct client clients[CLIENTS];

/* --- requests --------------------------------------------------------------------------------------------------- */

static void
refuse (struct client *client, const char *reason)
{
  answer_begin (&client->answer);
  answer_text (&client->answer, "error", reason);
  answer_end (&client->answer);
}

/* Whole, shortest-form UTF-8 without control characters: it is put into JSON and on terminals. */
static bool
is_label (const unsigned char *text)
{
  while (*text != 0) {
    const unsigned char first = *text++;
    int more = first < 0x80 ? 0 : first >= 0xc2 && first < 0xe0 ? 1 : first >= 0xe0 && first < 0xf0 ? 2
             : first >= 0xf0 && first < 0xf5 ? 3 : -1;

    if (more == -1 || first < 0x20 || first == 0x7f || (first == 0xc2 && *text < 0xa0)
        || (first == 0xe0 && *text < 0xa0) || (first == 0xed && *text >= 0xa0) || (first == 0xf0 && *text < 0x90)
        || (first == 0xf4 && *text >= 0x90))
      return false;
    for (; more > 0; more--)
      if ((*text++ & 0xc0) != 0x80)
        return false;
  }
  return true;
}

static void
mark (struct client *client, const char *label)
{
  const size_t length = strlen (label);

  if (length == 0 || length > LABEL_MOST || !is_label ((const unsigned char *)label)) {
    refuse (client, "a label is 1 to 256 bytes of UTF-8 without control characters");
    return;
  }
  client->wall = now_ns (CLOCK_REALTIME);
  if (journal_append (journal, KIND_MARK, NO_DISK, 0, (uint32_t)length, label, 0, &client->sequence) == -1) {
    refuse (client, errno == ENOSPC ? "no space" : strerror (errno));
    return;
  }
  memcpy (client->mark, label, length + 1);
  journal_ask_durable (journal);
  client->waiting = FOR_DURABLE;
}

static void
forget (struct client *client, const char *text)
{
  char *end;
  uint64_t upto, bytes;
  size_t n;

  errno = 0;
  upto = strtoull (text, &end, 10);
  if (*text < '0' || *text > '9' || *end != 0 || errno != 0) {
    refuse (client, "forget needs a sequence number");
    return;
  }
  n = journal_forget (journal, upto, &bytes);
  answer_begin (&client->answer);
  answer_number (&client->answer, "segments", n);
  answer_number (&client->answer, "bytes", bytes);
  answer_end (&client->answer);
}

static void
request (struct client *client, char *line)
{
  char *argument = strchr (line, ' ');

  client->sent = 0;
  if (argument != NULL)
    *argument++ = 0;
  if (strcmp (line, "status") == 0 && argument == NULL)
    answer_status (&client->answer, journal);
  else if (strcmp (line, "stats") == 0 && argument == NULL)
    answer_stats (&client->answer, journal);
  else if (strcmp (line, "mark") == 0 && argument != NULL)
    mark (client, argument);
  else if (strcmp (line, "seal") == 0 && argument == NULL) {
    client->sequence = journal_ask_sealed (journal);
    client->waiting = FOR_SEALED;
  } else if (strcmp (line, "forget") == 0 && argument != NULL)
    forget (client, argument);
  else
    refuse (client, "the requests are: status, stats, mark LABEL, seal, forget UPTO");
}

/* Whether what a client waits for has come true or never will; it has an answer then. */
static void
look_at_waiting (struct client *client)
{
  uint64_t durable, sealed;
  bool failed;

  if (client->waiting == NOTHING)
    return;
  pthread_mutex_lock (&journal->lock);
  durable = journal->durable;
  sealed = journal->sealed_upto;
  failed = journal->state == STATE_FAILED;
  pthread_mutex_unlock (&journal->lock);
  if ((client->waiting == FOR_DURABLE ? durable : sealed) >= client->sequence) {
    answer_begin (&client->answer);
    if (client->waiting == FOR_DURABLE) {
      answer_text (&client->answer, "mark", client->mark);
      answer_number (&client->answer, "sequence", client->sequence);
      answer_number (&client->answer, "wall_ns", (uint64_t)client->wall);
      answer_number (&client->answer, "durable", durable);
    } else
      answer_number (&client->answer, "sealed", sealed);
    answer_end (&client->answer);
  } else if (failed)
    refuse (client, "the journal has failed");
  else
    return;
  client->waiting = NOTHING;
}

/* --- clients ---------------------------------------------------------------------------------------------------- */

static void
drop (struct client *client)
{
  if (client->fd >= 0)
    close (client->fd);
  client->have = client->sent = client->answer.length = 0;
  client->waiting = NOTHING;
  client->leave = false;
  client->fd = -1;
}

static bool
is_busy (const struct client *client)
{
  return client->waiting != NOTHING || client->answer.length > client->sent;
}

/* Take the first whole line out of what was read, when there is nothing else to do for this client. */
static void
next_request (struct client *client)
{
  char line[LINE_MOST];
  char *end;
  size_t length;

  while (!is_busy (client) && !client->leave && (end = memchr (client->line, '\n', client->have)) != NULL) {
    length = (size_t)(end - client->line);
    memcpy (line, client->line, length);
    line[length] = 0;
    client->have -= length + 1;
    memmove (client->line, end + 1, client->have);
    if (strlen (line) < length)
      refuse (client, "a zero byte in a request");
    else
      request (client, line);
    look_at_waiting (client);
  }
  if (!is_busy (client) && client->have == LINE_MOST) {
    client->sent = 0;
    refuse (client, "the line is too long");
    client->leave = true;
  }
}

static void
receive (struct client *client)
{
  ssize_t got = recv (client->fd, client->line + client->have, LINE_MOST - client->have, MSG_DONTWAIT);

  if (got == -1 && (errno == EAGAIN || errno == EINTR))
    return;
  if (got <= 0) {
    drop (client);
    return;
  }
  client->heard = now_ns (CLOCK_MONOTONIC);
  client->have += (size_t)got;
}

static void
deliver (struct client *client)
{
  ssize_t sent;

  if (client->answer.length <= client->sent)
    return;
  sent = send (client->fd, client->answer.text + client->sent, client->answer.length - client->sent,
               MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent == -1) {
    if (errno != EAGAIN && errno != EINTR)
      drop (client);
    return;
  }
  client->sent += (size_t)sent;
  if (client->sent == client->answer.length) {
    client->sent = client->answer.length = 0;
    if (client->leave)
      drop (client);
  }
}

static void
welcome (int fd)
{
  struct client *place = &clients[0];

  for (int n = 0; n < CLIENTS && place->fd != -1; n++)
    if (clients[n].fd == -1 || clients[n].heard < place->heard)
      place = &clients[n];
  drop (place);
  place->fd = fd;
  place->heard = now_ns (CLOCK_MONOTONIC);
}

static void
welcome_all (void)
{
  int fd;

  /* As many as there are places: then those that are there are looked at again. */
  for (int n = 0; n < CLIENTS && (fd = accept4 (listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) != -1; n++)
    welcome (fd);
}

static void
serve (struct client *client, short events)
{
  if (client->fd < 0)
    return;
  if (events & (POLLERR | POLLNVAL) || (events & POLLHUP && is_busy (client)))
    drop (client); /* nobody is there to read the answer */
  else if (events & (POLLIN | POLLHUP) && client->have < LINE_MOST)
    receive (client);
  if (client->fd < 0)
    return;
  look_at_waiting (client);
  do {
    next_request (client);
    deliver (client);
  } while (client->fd >= 0 && !is_busy (client) && memchr (client->line, '\n', client->have) != NULL);
}

static short
interest (const struct client *client)
{
  if (client->answer.length > client->sent)
    return POLLOUT;
  return client->waiting == NOTHING && client->have < LINE_MOST ? POLLIN : 0;
}

static bool
is_stopping (void)
{
  bool answer;

  pthread_mutex_lock (&journal->lock);
  answer = stopping;
  pthread_mutex_unlock (&journal->lock);
  return answer;
}

static void *
loop (void *unused)
{
  struct pollfd polled[CLIENTS + 2];

  (void)unused;
  while (!is_stopping ()) {
    uint64_t count;

    polled[CLIENTS] = (struct pollfd){ .fd = listener, .events = POLLIN };
    polled[CLIENTS + 1] = (struct pollfd){ .fd = journal->wake_control, .events = POLLIN };
    for (int n = 0; n < CLIENTS; n++)
      polled[n] = (struct pollfd){ .fd = clients[n].fd, .events = interest (&clients[n]) };
    if (poll (polled, CLIENTS + 2, -1) == -1)
      continue;
    if (polled[CLIENTS + 1].revents && read (journal->wake_control, &count, sizeof count) == -1)
      continue; /* somebody else's wake-up cannot be: try again */
    for (int n = 0; n < CLIENTS; n++)
      serve (&clients[n], polled[n].revents);
    if (polled[CLIENTS].revents)
      welcome_all ();
  }
  for (int n = 0; n < CLIENTS; n++)
    drop (&clients[n]);
  return NULL;
}

/* --- beginning and end ------------------------------------------------------------------------------------------ */

static bool
nobody_listens (const struct sockaddr_un *address)
{
  int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  bool refused = fd >= 0 && connect (fd, (const struct sockaddr *)address, sizeof *address) == -1
                 && errno == ECONNREFUSED;

  if (fd >= 0)
    close (fd);
  return refused;
}

int
control_open (struct journal *owner, const char *where)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  mode_t before;
  int result;

  journal = owner;
  stopping = false;
  for (int n = 0; n < CLIENTS; n++)
    clients[n].fd = -1;
  path = strdup (where);
  if (path == NULL || strlen (where) >= sizeof address.sun_path) {
    nbdkit_error ("control=%s: longer than %zu bytes", where, sizeof address.sun_path - 1);
    return -1;
  }
  strcpy (address.sun_path, where);
  if (nobody_listens (&address))
    unlink (where);
  listener = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  journal->wake_control = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  /* The mode must be right from its first moment; there is only this thread yet. */
  before = umask (0177);
  result = listener == -1 || journal->wake_control == -1 ? -1
           : bind (listener, (struct sockaddr *)&address, sizeof address);
  keep_errno (umask (before));
  if (result == -1 || listen (listener, SOMAXCONN) == -1) {
    nbdkit_error ("control=%s: %m", where);
    return -1;
  }
  return 0;
}

int
control_start (void)
{
  sigset_t all, before;
  int error;

  if (listener == -1)
    return 0;
  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &before);
  error = pthread_create (&thread, NULL, loop, NULL);
  pthread_sigmask (SIG_SETMASK, &before, NULL);
  if (error != 0) {
    nbdkit_error ("pthread_create: %s", strerror (error));
    return -1;
  }
  running = true;
  return 0;
}

void
control_stop (void)
{
  const uint64_t one = 1;

  if (running) {
    pthread_mutex_lock (&journal->lock);
    stopping = true;
    pthread_mutex_unlock (&journal->lock);
    if (write (journal->wake_control, &one, sizeof one) == -1) {
      /* Its counter is at its end: the thread is awake. */
    }
    pthread_join (thread, NULL);
    running = false;
    unlink (path);
  }
  if (listener >= 0)
    close (listener);
  listener = -1;
  free (path);
  path = NULL;
}
