/* The whole user space of the tiny guest: process 1 of a machine that boots in seconds and knows exactly what it wrote.
 *
 *   writer w:  op 1, op 2, ... op N      each op is a pure function of (seed, w, k): disk k % disks, a slot, stamp or zero
 *   slot:      every sector of it carries  magic writer disk seq gen offset length crc filler
 *
 * Each writer is serial: op k+1 begins after op k was acknowledged. So a set of disks taken at one instant is right if
 * and only if, for each writer, it is exactly the state after its op N for some N, over all disks together. The host
 * makes the same check on images (tests/support/stamps.py). `gen` is the time of the boot that wrote a stamp: blocks of
 * an abandoned future show because their gen is out of order.
 *
 * Long on purpose: it is compiled without any library of ours, as one file, by whoever has only a C compiler.
 *
 * The host asks over the second serial port, one line, and gets one line of JSON:
 *
 *   hello                 disks, gen
 *   state [N N N]         stop writing, read everything back, say which N this is and whether it is exact. Zeroing what is
 *                         zero changes nothing, so two N can be the same state: the expected N is preferred, else the
 *                         smallest
 *   start [RATE]          write, RATE ops a second for each writer (0: as fast as possible); scans first
 *   stop                  finish the ops under way and flush the disks
 *   stats [reset]         counters, errors, longest write in microseconds, age of the ops under way
 *   reads SECONDS DEPTH   verified random reads by DEPTH threads
 *   scatter DISK COUNT SEED [FROM TO]   COUNT random 4 KiB blocks between two offsets
 *   fill DISK OFFSET LENGTH SEED        pseudo-random data
 *   zero|discard DISK OFFSET LENGTH
 *   crc DISK OFFSET LENGTH              zlib's crc32 of what can be read there
 *   sh COMMAND            by busybox; exit code and output
 *   reboot, poweroff
 *
 * Kernel command line: rw.seed= rw.span= rw.base= rw.rate= rw.auto=1 rw.data=vda,vdb (default: all but the mounted one)
 * rw.mount=vdc (ext4 at /data) rw.dsync=1 (each op is durable before it counts: without, what QEMU has not flushed is
 * lost by its kill -9, like by a power cut).
 *
 * What it cannot tell: the guest's clock stands still while QEMU is paused, so a pause is not in its latencies.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/input.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define SECTOR 512
#define MAX_DISKS 16
#define WRITERS 3
#define MAX_GENS 256
#define BUFFER (1 << 20)

struct stamp {
    char magic[8];
    uint32_t writer, disk;
    uint64_t seq, gen, offset;
    uint32_t length, crc;
    uint64_t filler[58];
};
_Static_assert(sizeof(struct stamp) == SECTOR, "a stamp is a sector");

struct disk {
    char name[32];
    int fd;
    uint64_t size;
};

struct op {
    int disk;
    uint64_t slot, offset;
    bool zero;
};

struct writer {
    int index;
    uint32_t slot_size;
    uint64_t seq; /* acknowledged */
    bool known;   /* seq was read from the disks */
    uint64_t begun_us;
    pthread_t thread;
};

static const uint32_t slot_sizes[WRITERS] = {4096, 12288, 4096};
static struct disk disks[MAX_DISKS];
static int disk_count; /* of all disks */
static int data[MAX_DISKS], data_count; /* the stamped ones, as indexes of `disks` */
static struct writer writers[WRITERS];
static uint64_t seed = 1, span = 4 << 20, base = 1 << 20, generation;
static int port = -1;

/* Guards all that follows. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool running;
static int rate, busy;
static uint64_t writes, errors, longest_us;
static int last_errno;

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static uint32_t crc_table[256];

static void crc_init(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
        crc_table[i] = c;
    }
}

static uint32_t crc32_of(uint32_t crc, const void *buf, size_t len)
{
    const uint8_t *p = buf;
    crc = ~crc;
    while (len--)
        crc = crc_table[(crc ^ *p++) & 0xff] ^ (crc >> 8);
    return ~crc;
}

static uint32_t stamp_crc(const struct stamp *s)
{
    uint32_t crc = crc32_of(0, s, offsetof(struct stamp, crc));
    return crc32_of(crc, s->filler, sizeof s->filler);
}

static void *aligned(size_t size)
{
    void *p;
    if (posix_memalign(&p, 4096, size))
        abort();
    return p;
}

/* --- what is written ------------------------------------------------------------------------------------------- */

/* So many ops in a row of which nothing is to be seen are hardly ever there. */
#define TRACELESS 64

static struct op op_of(int writer, uint64_t k)
{
    struct op op;
    uint64_t r = mix(mix(seed) ^ ((uint64_t)writer << 56) ^ k);
    op.disk = k % data_count;
    op.slot = (r & 0xffffffff) % (span / slot_sizes[writer]);
    op.offset = base + writer * span + op.slot * slot_sizes[writer];
    op.zero = writer == 2 && (r >> 32) % 4 == 0;
    return op;
}

static void make_stamps(uint8_t *buf, int writer, uint64_t k, const struct op *op)
{
    uint32_t length = slot_sizes[writer];
    for (uint32_t at = 0; at < length; at += SECTOR) {
        struct stamp *s = (struct stamp *)(buf + at);
        memcpy(s->magic, "RWSTAMP1", 8);
        s->writer = writer;
        s->disk = op->disk;
        s->seq = k;
        s->gen = generation;
        s->offset = op->offset + at;
        s->length = length;
        /* Half random, half not: data that compresses about as well as files do. */
        uint64_t x = mix(k ^ s->offset ^ generation);
        for (int i = 0; i < 58; i++) {
            if (i < 29)
                x = mix(x);
            s->filler[i] = x;
        }
        s->crc = stamp_crc(s);
    }
}

static int do_op(uint8_t *buf, const struct op *op, uint32_t length)
{
    int fd = disks[data[op->disk]].fd;
    if (op->zero) {
        uint64_t range[2] = {op->offset, length};
        return ioctl(fd, BLKZEROOUT, range) ? errno : 0;
    }
    ssize_t n = pwrite(fd, buf, length, op->offset);
    return n == length ? 0 : n < 0 ? errno : EIO;
}

static void *write_loop(void *arg)
{
    struct writer *w = arg;
    uint8_t *buf = aligned(w->slot_size);
    uint64_t next_us = 0;

    pthread_mutex_lock(&lock);
    for (;;) {
        if (!running) {
            pthread_cond_wait(&changed, &lock);
            next_us = 0;
            continue;
        }
        uint64_t k = w->seq + 1;
        int hz = rate;
        busy++;
        w->begun_us = now_us();
        pthread_mutex_unlock(&lock);

        struct op op = op_of(w->index, k);
        if (!op.zero)
            make_stamps(buf, w->index, k, &op);
        uint64_t start = now_us();
        int err = do_op(buf, &op, w->slot_size);
        uint64_t took = now_us() - start;

        pthread_mutex_lock(&lock);
        busy--;
        w->begun_us = 0;
        if (took > longest_us)
            longest_us = took;
        if (err) {
            errors++;
            last_errno = err;
        } else {
            w->seq = k;
            writes++;
        }
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
        if (err) {
            fprintf(stderr, "rw: write error %d, writer %d op %llu\n", err, w->index, (unsigned long long)k);
            usleep(10000); /* the same op again: the state stays one of the possible ones */
        } else if (hz) {
            uint64_t t = now_us();
            if (!next_us)
                next_us = t;
            next_us += 1000000 / hz;
            if (next_us > t)
                usleep(next_us - t);
            else
                next_us = t;
        }
        pthread_mutex_lock(&lock);
    }
    return NULL;
}

static void stop_writers(void)
{
    pthread_mutex_lock(&lock);
    running = false;
    pthread_cond_broadcast(&changed);
    while (busy)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

/* --- reading it back ------------------------------------------------------------------------------------------- */

struct scan {
    uint64_t wrong, longest_us, max_gen;
    char first_wrong[160];
    struct { uint64_t gen, low, high; } gens[MAX_GENS];
    int gen_count;
};

static void note_wrong(struct scan *s, const char *fmt, ...)
{
    va_list ap;
    if (!s->wrong++) {
        va_start(ap, fmt);
        vsnprintf(s->first_wrong, sizeof s->first_wrong, fmt, ap);
        va_end(ap);
    }
}

static void note_gen(struct scan *s, uint64_t gen, uint64_t seq)
{
    int i;
    for (i = 0; i < s->gen_count && s->gens[i].gen != gen; i++)
        ;
    if (i == s->gen_count) {
        if (i == MAX_GENS)
            return;
        s->gens[i].gen = gen;
        s->gens[i].low = s->gens[i].high = seq;
        s->gen_count++;
    }
    if (seq < s->gens[i].low)
        s->gens[i].low = seq;
    if (seq > s->gens[i].high)
        s->gens[i].high = seq;
    if (gen > s->max_gen)
        s->max_gen = gen;
}

static bool all_zero(const uint8_t *p, size_t n)
{
    return !p[0] && !memcmp(p, p + 1, n - 1);
}

/* The sequence number in a slot, 0 when it is all zero; UINT64_MAX and a message when it is not one whole op. */
static uint64_t slot_seq(struct scan *s, const uint8_t *buf, int w, int d, uint64_t offset)
{
    uint32_t length = slot_sizes[w];
    const struct stamp *first = (const struct stamp *)buf;
    if (all_zero(buf, length))
        return 0;
    for (uint32_t at = 0; at < length; at += SECTOR) {
        const struct stamp *t = (const struct stamp *)(buf + at);
        const char *why = memcmp(t->magic, "RWSTAMP1", 8) ? "no stamp"
            : t->crc != stamp_crc(t) ? "crc"
            : t->offset != offset + at || (int)t->disk != d || (int)t->writer != w ? "belongs elsewhere"
            : t->seq != first->seq || t->gen != first->gen ? "mixed" : NULL;
        if (why) {
            note_wrong(s, "writer %d disk %d offset %llu: %s", w, d, (unsigned long long)(offset + at), why);
            return UINT64_MAX;
        }
    }
    note_gen(s, first->gen, first->seq);
    return first->seq;
}

/* Reads one writer's region of every disk into found[disk * slots + slot]. */
static uint64_t read_region(struct scan *s, int w, uint64_t *found)
{
    uint64_t slots = span / slot_sizes[w], high = 0;
    uint32_t per_read = BUFFER / slot_sizes[w];
    uint8_t *buf = aligned(BUFFER);
    for (int d = 0; d < data_count; d++) {
        for (uint64_t slot = 0; slot < slots; slot += per_read) {
            uint64_t n = slots - slot < per_read ? slots - slot : per_read;
            uint64_t offset = base + w * span + slot * slot_sizes[w], start = now_us();
            ssize_t want = n * slot_sizes[w], got = pread(disks[data[d]].fd, buf, want, offset);
            uint64_t took = now_us() - start;
            if (took > s->longest_us)
                s->longest_us = took;
            if (got != want) {
                note_wrong(s, "disk %d offset %llu: read error %d", d, (unsigned long long)offset, errno);
                memset(buf, 0, want);
            }
            for (uint64_t i = 0; i < n; i++) {
                uint64_t seq = slot_seq(s, buf + i * slot_sizes[w], w, d, offset + i * slot_sizes[w]);
                found[d * slots + slot + i] = seq;
                if (seq != UINT64_MAX && seq > high)
                    high = seq;
            }
        }
    }
    free(buf);
    return high;
}

/* How many slots differ from the state after op n; the first of them goes to the message. */
static uint64_t compare_with(struct scan *s, int w, uint64_t n, const uint64_t *found)
{
    uint64_t slots = span / slot_sizes[w], total = slots * data_count, differing = 0, left = total;
    uint64_t *expected = calloc(total, sizeof *expected);
    uint8_t *seen = calloc(total, 1);
    for (uint64_t k = n; k >= 1 && left; k--) {
        struct op op = op_of(w, k);
        uint64_t at = op.disk * slots + op.slot;
        if (seen[at])
            continue;
        seen[at] = 1;
        left--;
        expected[at] = op.zero ? 0 : k;
    }
    for (uint64_t i = 0; i < total; i++) {
        if (expected[i] == found[i])
            continue;
        differing++;
        if (s)
            note_wrong(s, "writer %d disk %d slot %llu: op %llu where %llu is right", w, (int)(i / slots),
                (unsigned long long)(i % slots), (unsigned long long)found[i], (unsigned long long)expected[i]);
    }
    free(expected);
    free(seen);
    return differing;
}

static bool leaves_nothing(int w, uint64_t k, const uint64_t *found)
{
    struct op op = op_of(w, k);
    return op.zero || !found[op.disk * (span / slot_sizes[w]) + op.slot];
}

static void scan_writer(struct scan *s, int w, uint64_t expected)
{
    uint64_t total = span / slot_sizes[w] * data_count;
    uint64_t *found = calloc(total, sizeof *found);
    s->gen_count = 0;
    uint64_t high = read_region(s, w, found), best = high, fewest;
    if (expected >= high && expected - high < 64 && !compare_with(NULL, w, expected, found))
        best = expected;
    fewest = compare_with(NULL, w, best, found);
    /* A zeroing op leaves no stamp, nor does one whose slot was zeroed since: the true N may be a few further on. */
    for (uint64_t n = high + 1; fewest && n - high < TRACELESS && leaves_nothing(w, n, found); n++) {
        uint64_t d = compare_with(NULL, w, n, found);
        if (d < fewest) {
            fewest = d;
            best = n;
        }
    }
    compare_with(s, w, best, found);
    for (int i = 0; i < s->gen_count; i++)
        for (int j = 0; j < s->gen_count; j++)
            if (s->gens[i].gen < s->gens[j].gen && s->gens[i].high >= s->gens[j].low)
                note_wrong(s, "writer %d: op %llu is from an abandoned future", w, (unsigned long long)s->gens[i].high);
    pthread_mutex_lock(&lock);
    writers[w].seq = best;
    writers[w].known = true;
    pthread_mutex_unlock(&lock);
    free(found);
}

static void scan_all(struct scan *s, const uint64_t *expected)
{
    memset(s, 0, sizeof *s);
    for (int w = 0; w < WRITERS; w++)
        scan_writer(s, w, expected && expected[w] ? expected[w] : writers[w].seq);
    if (s->max_gen >= generation)
        generation = s->max_gen + 1;
}

/* --- verified random reads ------------------------------------------------------------------------------------- */

static struct {
    pthread_mutex_t lock;
    uint64_t reads, wrong, errors, longest_us, until_us;
} rd = {.lock = PTHREAD_MUTEX_INITIALIZER};

static uint64_t seq_of(int w)
{
    pthread_mutex_lock(&lock);
    uint64_t k = writers[w].seq;
    pthread_mutex_unlock(&lock);
    return k;
}

/* Whether a write of w that was under way since its op `before` goes to this place: what is read meanwhile may be torn. */
static bool written_since(int w, uint64_t before, int d, uint64_t offset)
{
    for (uint64_t k = before + 1, last = seq_of(w) + 1; k <= last; k++) {
        struct op op = op_of(w, k);
        if (op.disk == d && op.offset == offset)
            return true;
    }
    return false;
}

static void *read_loop(void *arg)
{
    uint64_t r = mix((uintptr_t)arg ^ now_us());
    uint8_t *buf = aligned(12288);
    while (now_us() < rd.until_us) {
        r = mix(r);
        int w = r % WRITERS, d = (r >> 8) % data_count;
        uint64_t slots = span / slot_sizes[w], offset = base + w * span + (r >> 16) % slots * slot_sizes[w];
        struct scan s;
        s.wrong = 0;
        s.gen_count = MAX_GENS - 1;
        s.max_gen = 0;
        uint64_t before = seq_of(w), start = now_us();
        ssize_t got = pread(disks[data[d]].fd, buf, slot_sizes[w], offset);
        uint64_t took = now_us() - start;
        if (got == slot_sizes[w] && !written_since(w, before, d, offset))
            slot_seq(&s, buf, w, d, offset);
        pthread_mutex_lock(&rd.lock);
        rd.reads++;
        rd.wrong += s.wrong;
        rd.errors += got != slot_sizes[w];
        if (took > rd.longest_us)
            rd.longest_us = took;
        pthread_mutex_unlock(&rd.lock);
    }
    free(buf);
    return NULL;
}

/* --- answers --------------------------------------------------------------------------------------------------- */

static char answer[65536];
static size_t answered;

static void say(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(answer + answered, sizeof answer - answered, fmt, ap);
    va_end(ap);
    if (n > 0)
        answered += n;
    if (answered >= sizeof answer)
        answered = sizeof answer - 1;
}

static void say_string(const char *text)
{
    say("\"");
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
        if (*p == '"' || *p == '\\')
            say("\\%c", *p);
        else if (*p < 32 || *p > 126)
            say("\\u%04x", *p);
        else
            say("%c", *p);
    }
    say("\"");
}

static void send_answer(void)
{
    size_t done = 0;
    say("\n");
    while (done < answered) {
        ssize_t n = write(port, answer + done, answered - done);
        if (n <= 0)
            break;
        done += n;
    }
    answered = 0;
}

static void say_seq(void)
{
    say("\"seq\":[");
    for (int w = 0; w < WRITERS; w++)
        say("%s%llu", w ? "," : "", (unsigned long long)writers[w].seq);
    say("]");
}

static void verb_hello(void)
{
    say("{\"ok\":true,\"gen\":%llu,\"uptime_ms\":%llu,\"disks\":[", (unsigned long long)generation,
        (unsigned long long)now_us() / 1000);
    for (int i = 0; i < disk_count; i++)
        say("%s{\"name\":\"%s\",\"size\":%llu}", i ? "," : "", disks[i].name, (unsigned long long)disks[i].size);
    say("],\"data\":[");
    for (int i = 0; i < data_count; i++)
        say("%s\"%s\"", i ? "," : "", disks[data[i]].name);
    say("]}");
}

static void verb_state(const uint64_t *expected)
{
    static struct scan s;
    stop_writers();
    uint64_t start = now_us();
    scan_all(&s, expected);
    say("{\"ok\":true,\"exact\":%s,\"wrong\":%llu,\"longest_us\":%llu,\"seconds\":%.3f,", s.wrong ? "false" : "true",
        (unsigned long long)s.wrong, (unsigned long long)s.longest_us, (now_us() - start) / 1e6);
    say_seq();
    say(",\"first_wrong\":");
    say_string(s.wrong ? s.first_wrong : "");
    say("}");
}

static void start_writers(int hz)
{
    static struct scan s;
    if (data_count && !writers[0].known)
        scan_all(&s, NULL);
    pthread_mutex_lock(&lock);
    rate = hz;
    running = data_count > 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void verb_stats(bool reset)
{
    uint64_t oldest = 0, t = now_us();
    pthread_mutex_lock(&lock);
    for (int w = 0; w < WRITERS; w++)
        if (writers[w].begun_us && t - writers[w].begun_us > oldest)
            oldest = t - writers[w].begun_us;
    say("{\"ok\":true,\"running\":%s,\"writes\":%llu,\"errors\":%llu,\"errno\":%d,\"longest_us\":%llu,\"under_way_us\":%llu,",
        running ? "true" : "false", (unsigned long long)writes, (unsigned long long)errors, last_errno,
        (unsigned long long)longest_us, (unsigned long long)oldest);
    say_seq();
    say("}");
    if (reset)
        longest_us = 0;
    pthread_mutex_unlock(&lock);
}

static void verb_reads(double seconds, int depth)
{
    pthread_t threads[64];
    if (depth < 1 || depth > 64)
        depth = 32;
    rd.reads = rd.wrong = rd.errors = rd.longest_us = 0;
    rd.until_us = now_us() + seconds * 1e6;
    for (int i = 0; i < depth; i++)
        pthread_create(&threads[i], NULL, read_loop, (void *)(uintptr_t)(i + 1));
    for (int i = 0; i < depth; i++)
        pthread_join(threads[i], NULL);
    say("{\"ok\":true,\"reads\":%llu,\"wrong\":%llu,\"errors\":%llu,\"longest_us\":%llu}", (unsigned long long)rd.reads,
        (unsigned long long)rd.wrong, (unsigned long long)rd.errors, (unsigned long long)rd.longest_us);
}

static int find_disk(const char *name)
{
    for (int i = 0; i < disk_count; i++)
        if (!strcmp(disks[i].name, name))
            return i;
    return -1;
}

static void random_bytes(uint8_t *buf, size_t len, uint64_t x)
{
    for (size_t i = 0; i < len; i += 8) {
        x = mix(x);
        memcpy(buf + i, &x, 8);
    }
}

static void done(int bad, int err)
{
    say("{\"ok\":%s,\"errors\":%d,\"errno\":%d}", bad ? "false" : "true", bad, err);
}

static void verb_scatter(const struct disk *d, uint64_t count, uint64_t s, uint64_t from, uint64_t to)
{
    uint8_t *buf = aligned(4096);
    int bad = 0, err = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t block = mix(mix(s) ^ i) % ((to - from) / 4096);
        random_bytes(buf, 4096, mix(s) ^ (i << 32));
        if (pwrite(d->fd, buf, 4096, from + block * 4096) != 4096) {
            bad++;
            err = errno;
        }
    }
    free(buf);
    done(bad, err);
}

static void verb_fill(const struct disk *d, uint64_t offset, uint64_t length, uint64_t s)
{
    uint8_t *buf = aligned(BUFFER);
    int bad = 0, err = 0;
    for (uint64_t at = 0; at < length; at += BUFFER) {
        size_t n = length - at < BUFFER ? length - at : BUFFER;
        random_bytes(buf, n, mix(s) ^ (offset + at));
        if (pwrite(d->fd, buf, n, offset + at) != (ssize_t)n) {
            bad++;
            err = errno;
        }
    }
    free(buf);
    done(bad, err);
}

static void verb_crc(const struct disk *d, uint64_t offset, uint64_t length)
{
    uint8_t *buf = aligned(BUFFER);
    uint32_t crc = 0;
    int bad = 0;
    for (uint64_t at = 0; at < length && !bad; at += BUFFER) {
        size_t n = length - at < BUFFER ? length - at : BUFFER;
        bad = pread(d->fd, buf, n, offset + at) != (ssize_t)n;
        crc = crc32_of(crc, buf, n);
    }
    free(buf);
    say("{\"ok\":%s,\"crc\":%u}", bad ? "false" : "true", crc);
}

static void verb_sh(const char *command)
{
    static char output[16384];
    size_t n = 0;
    FILE *f = popen(command, "r");
    if (f) {
        n = fread(output, 1, sizeof output - 1, f);
        output[n] = 0;
        while (fgetc(f) != EOF)
            ;
    }
    int status = f ? pclose(f) : -1;
    say("{\"ok\":%s,\"code\":%d,\"output\":", status == 0 ? "true" : "false", WEXITSTATUS(status));
    say_string(n ? output : "");
    say("}");
}

static void power(int how)
{
    say("{\"ok\":true}");
    send_answer();
    tcdrain(port);
    stop_writers();
    sync();
    umount("/data");
    reboot(how);
}

static void answer_line(char *line)
{
    char *words[6] = {0};
    char whole[2048];
    snprintf(whole, sizeof whole, "%s", line);
    int n = 0;
    for (char *p = strtok(line, " "); p && n < 6; p = strtok(NULL, " "))
        words[n++] = p;
    if (!n)
        return;
    const char *v = words[0];
    uint64_t number[6] = {0};
    for (int i = 1; i < n; i++)
        number[i] = strtoull(words[i], NULL, 0);
    int d = n > 1 ? find_disk(words[1]) : -1;

    if (!strcmp(v, "hello"))
        verb_hello();
    else if (!strcmp(v, "state"))
        verb_state(number + 1);
    else if (!strcmp(v, "start")) {
        start_writers(number[1]);
        verb_stats(false);
    } else if (!strcmp(v, "stop")) {
        stop_writers();
        for (int i = 0; i < disk_count; i++)
            fsync(disks[i].fd);
        verb_stats(false);
    } else if (!strcmp(v, "stats"))
        verb_stats(n > 1);
    else if (!strcmp(v, "reads"))
        verb_reads(n > 1 ? strtod(words[1], NULL) : 1, number[2]);
    else if (!strcmp(v, "sh"))
        verb_sh(whole + 3);
    else if (!strcmp(v, "reboot"))
        power(RB_AUTOBOOT);
    else if (!strcmp(v, "poweroff"))
        power(RB_POWER_OFF);
    else if (d < 0)
        say("{\"ok\":false,\"error\":\"no such verb or disk\"}");
    else if (!strcmp(v, "scatter") && n >= 4)
        verb_scatter(&disks[d], number[2], number[3], number[4], n > 5 ? number[5] : disks[d].size);
    else if (!strcmp(v, "fill") && n >= 5)
        verb_fill(&disks[d], number[2], number[3], number[4]);
    else if (!strcmp(v, "crc") && n >= 4)
        verb_crc(&disks[d], number[2], number[3]);
    else if ((!strcmp(v, "zero") || !strcmp(v, "discard")) && n >= 4) {
        int bad = ioctl(disks[d].fd, *v == 'z' ? BLKZEROOUT : BLKDISCARD, &number[2]);
        done(bad != 0, bad ? errno : 0);
    } else
        say("{\"ok\":false,\"error\":\"arguments\"}");
    send_answer();
}

/* --- start ----------------------------------------------------------------------------------------------------- */

static void load_modules(void)
{
    /* /modules/order lists the files so that each comes after what it needs. */
    char path[256];
    FILE *f = fopen("/modules/order", "r");
    while (f && fgets(path, sizeof path, f)) {
        path[strcspn(path, "\n")] = 0;
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
            fprintf(stderr, "rw: module %s: %s\n", path, strerror(errno));
        if (fd >= 0)
            close(fd);
    }
    if (f)
        fclose(f);
}

static char cmdline[4096];

static const char *option(const char *name, const char *fallback)
{
    static char value[16][256];
    static int used;
    char *p = strstr(cmdline, name);
    if (!p)
        return fallback;
    char *out = value[used++ % 16];
    snprintf(out, 256, "%s", p + strlen(name));
    out[strcspn(out, " \n")] = 0;
    return out;
}

static uint64_t size_option(const char *name, uint64_t fallback)
{
    const char *text = option(name, NULL);
    char *end;
    if (!text)
        return fallback;
    uint64_t n = strtoull(text, &end, 0);
    return *end == 'K' ? n << 10 : *end == 'M' ? n << 20 : *end == 'G' ? n << 30 : n;
}

static int by_name(const void *a, const void *b)
{
    /* virtio disks first, then the others */
    const struct disk *x = a, *y = b;
    if ((x->name[0] == 'v') != (y->name[0] == 'v'))
        return x->name[0] == 'v' ? -1 : 1;
    return strcmp(x->name, y->name);
}

static int count_disks(void)
{
    int n = 0;
    struct dirent *e;
    DIR *dir = opendir("/sys/block");
    while (dir && (e = readdir(dir)))
        if (!strncmp(e->d_name, "vd", 2) || !strncmp(e->d_name, "sd", 2))
            n++;
    if (dir)
        closedir(dir);
    return n;
}

static void find_disks(void)
{
    const char *mounted = option("rw.mount=", ""), *wanted = option("rw.data=", NULL);
    bool durable = atoi(option("rw.dsync=", "0"));
    int expected = atoi(option("rw.disks=", "1"));
    struct dirent *e;
    /* SCSI and SATA disks appear some time after their controller. */
    for (int i = 0; i < 200 && count_disks() < expected; i++)
        usleep(50000);
    DIR *dir = opendir("/sys/block");
    while (dir && (e = readdir(dir)) && disk_count < MAX_DISKS) {
        if (strncmp(e->d_name, "vd", 2) && strncmp(e->d_name, "sd", 2))
            continue;
        struct disk *d = &disks[disk_count];
        char path[64];
        snprintf(d->name, sizeof d->name, "%.31s", e->d_name);
        snprintf(path, sizeof path, "/dev/%s", d->name);
        d->fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC | (durable ? O_DSYNC : 0));
        if (d->fd < 0 || ioctl(d->fd, BLKGETSIZE64, &d->size)) {
            fprintf(stderr, "rw: %s: %s\n", path, strerror(errno));
            continue;
        }
        disk_count++;
    }
    if (dir)
        closedir(dir);
    qsort(disks, disk_count, sizeof *disks, by_name);
    for (int i = 0; i < disk_count; i++) {
        char in_list[300], item[36];
        snprintf(in_list, sizeof in_list, ",%s,", wanted ? wanted : "");
        snprintf(item, sizeof item, ",%.31s,", disks[i].name);
        if (wanted ? strstr(in_list, item) != NULL : strcmp(disks[i].name, mounted) != 0)
            data[data_count++] = i;
    }
}

static void mount_data(void)
{
    const char *name = option("rw.mount=", NULL);
    char path[64];
    if (!name)
        return;
    snprintf(path, sizeof path, "/dev/%s", name);
    if (mount(path, "/data", "ext4", 0, "errors=remount-ro"))
        fprintf(stderr, "rw: mount %s: %s\n", path, strerror(errno));
}

static void press(int fd)
{
    struct input_event e;
    if (read(fd, &e, sizeof e) == sizeof e && e.type == EV_KEY && e.code == KEY_POWER && e.value == 1) {
        stop_writers();
        sync();
        umount("/data");
        /* Nobody can ask any more. */
        fprintf(stderr, "rw: off, %llu errors, longest write %llu us\n", (unsigned long long)errors,
            (unsigned long long)longest_us);
        reboot(RB_POWER_OFF);
    }
}

/* Which of them is the power button depends on what else the machine has: all are listened to. */
static void *power_button(void *arg)
{
    struct pollfd found[8];
    int n = 0;
    (void)arg;
    for (int i = 0; i < 100 && !n; i++) {
        usleep(100000);
        for (int k = 0; k < 8; k++) {
            char path[32];
            snprintf(path, sizeof path, "/dev/input/event%d", k);
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            if (fd >= 0)
                found[n++] = (struct pollfd){.fd = fd, .events = POLLIN};
        }
    }
    while (n && poll(found, n, -1) > 0)
        for (int k = 0; k < n; k++)
            if (found[k].revents & POLLIN)
                press(found[k].fd);
    return NULL;
}

static void open_port(void)
{
    struct termios t;
    port = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (port < 0) {
        fprintf(stderr, "rw: no second serial port\n");
        return;
    }
    tcgetattr(port, &t);
    cfmakeraw(&t);
    cfsetspeed(&t, B115200);
    tcsetattr(port, TCSANOW, &t);
    tcflush(port, TCIFLUSH);
}

static void init(void)
{
    struct timespec t;
    mount("proc", "/proc", "proc", 0, "");
    mount("sys", "/sys", "sysfs", 0, "");
    mount("dev", "/dev", "devtmpfs", 0, "");
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; console >= 0 && fd < 3; fd++)
        dup2(console, fd);
    setenv("PATH", "/bin", 1);
    FILE *f = fopen("/proc/cmdline", "r");
    if (f && !fgets(cmdline, sizeof cmdline, f))
        cmdline[0] = 0;
    load_modules();
    seed = size_option("rw.seed=", seed);
    span = size_option("rw.span=", span);
    base = size_option("rw.base=", base);
    clock_gettime(CLOCK_REALTIME, &t);
    generation = t.tv_sec * 1000ull + t.tv_nsec / 1000000;
    crc_init();
}

int main(void)
{
    pthread_t button;
    static char line[2048];
    size_t length = 0;

    init();
    find_disks();
    mount_data();
    open_port();
    for (int w = 0; w < WRITERS; w++) {
        writers[w].index = w;
        writers[w].slot_size = slot_sizes[w];
        pthread_create(&writers[w].thread, NULL, write_loop, &writers[w]);
    }
    pthread_create(&button, NULL, power_button, NULL);
    fprintf(stderr, "rw: up, %d disks\n", disk_count);
    if (atoi(option("rw.auto=", "0")))
        start_writers(size_option("rw.rate=", 0));
    say("{\"up\":true}");
    send_answer();
    for (;;) {
        char c;
        if (port < 0 || read(port, &c, 1) != 1) {
            usleep(100000);
            continue;
        }
        if (c == '\n') {
            line[length] = 0;
            length = 0;
            answer_line(line);
        } else if (c != '\r' && length < sizeof line - 1) {
            line[length++] = c;
        }
    }
}
