/* A disk that can be full, and that remembers in which order it was written and synced.
 *
 * Loaded before libc (LD_PRELOAD). DISK_ROOT names the watched folder; logs in it, and what SQLite
 * shares in memory, are left alone. While the file DISK_FULL is
 * there, nothing can be written below the root: ENOSPC. While the file DISK_UNSYNCED is there, it
 * holds a number and a word: what has the word in its path is not synced, and the number is the
 * errno. Every change below the root is appended to
 * DISK_JOURNAL, a sync twice, when it began and when it ended: only what was written before its
 * beginning is safe after its end. `disk.py` reads the journal.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

struct head {
    uint32_t size; /* of what follows the head: path, other path, data */
    char op;
    char pad[3];
    uint32_t path, other;
    uint64_t inode, offset, token;
} __attribute__((packed));

static const char *root, *full, *unsynced, *journal_path;
static size_t root_length;
static int journal = -1;

__attribute__((constructor)) static void begin(void) {
    root = getenv("DISK_ROOT");
    full = getenv("DISK_FULL");
    unsynced = getenv("DISK_UNSYNCED");
    journal_path = getenv("DISK_JOURNAL");
    root_length = root ? strlen(root) : 0;
    if (journal_path && *journal_path)
        journal = open(journal_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

static int below(const char *path) {
    return root && strncmp(path, root, root_length) == 0 &&
           (path[root_length] == '/' || !path[root_length]) &&
           !strstr(path, "-shm") && !strstr(path, ".log");
}

/* The path of a watched file or folder; 0 when it is neither. */
static int name_of(int fd, char *path, uint64_t *inode) {
    char link[64];
    struct stat state;
    if (!root) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    if (!below(path) || fstat(fd, &state) != 0) return 0;
    if (!S_ISREG(state.st_mode) && !S_ISDIR(state.st_mode)) return 0;
    *inode = state.st_ino;
    return 1;
}

static void absolute(int folder, const char *path, char *out) {
    char link[64];
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = folder == AT_FDCWD ? readlink("/proc/self/cwd", out, PATH_MAX - 1)
                                   : readlink(link, out, PATH_MAX - 1);
    if (n < 0) n = 0;
    snprintf(out + n, PATH_MAX - n, "/%s", path);
}

static void note(char op, const char *path, const char *other, uint64_t inode, uint64_t offset,
                 uint64_t token, const void *data, size_t size) {
    int saved = errno;
    struct head head = {0};
    if (journal < 0) return;
    head.op = op;
    head.path = strlen(path);
    head.other = strlen(other);
    head.inode = inode;
    head.offset = offset;
    head.token = token;
    head.size = head.path + head.other + size;
    char *line = malloc(sizeof head + head.size);
    char *at = line;
    at = mempcpy(at, &head, sizeof head);
    at = mempcpy(at, path, head.path);
    at = mempcpy(at, other, head.other);
    mempcpy(at, data, size);
    /* one write of an append-only file is one piece, whoever else writes */
    REAL(write);
    if (real(journal, line, sizeof head + head.size) < 0) abort();
    free(line);
    errno = saved;
}

static int is_full(void) {
    if (!full || access(full, F_OK) != 0) return 0;
    errno = ENOSPC;
    return 1;
}

/* Whether a sync of this path fails; errno says why. */
static int is_lost(const char *path) {
    char text[64] = {0}, *word;
    int fd = unsynced ? open(unsynced, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return 0;
    int reason = strtol(text, &word, 10);
    if (!strstr(path, word + 1)) return 0;
    errno = reason;
    return 1;
}

static int opened(int fd, int flags) {
    char path[PATH_MAX];
    uint64_t inode;
    if (fd >= 0 && (flags & (O_CREAT | O_TRUNC)) && name_of(fd, path, &inode)) {
        if (flags & O_CREAT) note('C', path, "", inode, 0, 0, "", 0);
        if (flags & O_TRUNC) note('T', path, "", inode, 0, 0, "", 0);
    }
    return fd;
}

static int refused(int folder, const char *path, int flags) {
    char whole[PATH_MAX];
    if (!root || !(flags & O_CREAT)) return 0;
    absolute(folder, path, whole);
    return below(whole) && access(whole, F_OK) != 0 && is_full();
}

#define OPENER(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = va_arg(more, mode_t); \
        va_end(more); \
        REAL(name); \
        if (refused(AT_FDCWD, path, flags)) return -1; \
        return opened(real(path, flags, mode), flags); \
    }
OPENER(open)
OPENER(open64)

#define OPENER_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = va_arg(more, mode_t); \
        va_end(more); \
        REAL(name); \
        if (refused(folder, path, flags)) return -1; \
        return opened(real(folder, path, flags, mode), flags); \
    }
OPENER_AT(openat)
OPENER_AT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    uint64_t inode;
    REAL(write);
    if (!name_of(fd, path, &inode)) return real(fd, data, size);
    if (is_full()) return -1;
    ssize_t n = real(fd, data, size);
    if (n > 0) note('W', path, "", inode, lseek(fd, 0, SEEK_CUR) - n, 0, data, n);
    return n;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    uint64_t inode;
    REAL(writev);
    if (!name_of(fd, path, &inode)) return real(fd, parts, count);
    if (is_full()) return -1;
    ssize_t n = real(fd, parts, count), left = n;
    off_t at = n > 0 ? lseek(fd, 0, SEEK_CUR) - n : 0;
    for (int i = 0; i < count && left > 0; i++) {
        ssize_t taken = (ssize_t)parts[i].iov_len < left ? (ssize_t)parts[i].iov_len : left;
        note('W', path, "", inode, at, 0, parts[i].iov_base, taken);
        at += taken;
        left -= taken;
    }
    return n;
}

#define WRITER_AT(name, type) \
    ssize_t name(int fd, const void *data, size_t size, type offset) { \
        char path[PATH_MAX]; \
        uint64_t inode; \
        REAL(name); \
        if (!name_of(fd, path, &inode)) return real(fd, data, size, offset); \
        if (is_full()) return -1; \
        ssize_t n = real(fd, data, size, offset); \
        if (n > 0) note('W', path, "", inode, offset, 0, data, n); \
        return n; \
    }
WRITER_AT(pwrite, off_t)
WRITER_AT(pwrite64, off64_t)

#define CUTTER(name, type) \
    int name(int fd, type size) { \
        char path[PATH_MAX]; \
        uint64_t inode; \
        REAL(name); \
        int is_ours = name_of(fd, path, &inode); \
        int answer = real(fd, size); \
        if (is_ours && answer == 0) note('T', path, "", inode, size, 0, "", 0); \
        return answer; \
    }
CUTTER(ftruncate, off_t)
CUTTER(ftruncate64, off64_t)

#define SYNCER(name) \
    int name(int fd) { \
        static __thread uint64_t count; \
        char path[PATH_MAX]; \
        uint64_t inode; \
        REAL(name); \
        if (!name_of(fd, path, &inode)) return real(fd); \
        if (is_lost(path)) return -1; \
        uint64_t token = ((uint64_t)gettid() << 32) + ++count; \
        note('s', path, "", inode, 0, token, "", 0); \
        int answer = real(fd); \
        if (answer == 0) note('S', path, "", inode, 0, token, "", 0); \
        return answer; \
    }
SYNCER(fsync)
SYNCER(fdatasync)

static int renamed(int answer, int from_folder, const char *from, int to_folder, const char *to) {
    char whole[PATH_MAX], other[PATH_MAX];
    if (answer == 0 && root) {
        absolute(from_folder, from, whole);
        absolute(to_folder, to, other);
        if (below(whole) && below(other)) note('R', whole, other, 0, 0, 0, "", 0);
    }
    return answer;
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return renamed(real(from, to), AT_FDCWD, from, AT_FDCWD, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    return renamed(real(a, from, b, to), a, from, b, to);
}

static int unlinked(int answer, int folder, const char *path) {
    char whole[PATH_MAX];
    if (answer == 0 && root) {
        absolute(folder, path, whole);
        if (below(whole)) note('U', whole, "", 0, 0, 0, "", 0);
    }
    return answer;
}

int unlink(const char *path) {
    REAL(unlink);
    return unlinked(real(path), AT_FDCWD, path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    return unlinked(real(folder, path, flags), folder, path);
}
