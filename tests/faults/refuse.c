/* Preloaded into a process and all it starts: counts what they write under a folder, and refuses one of these calls.

   Every call that makes, writes, syncs or renames a file is looked at, where the program calls the C library for it; so
   the writes of Python, Rust (safetensors), MLX and llama.cpp are seen alike. What the C library's own streams write
   later, out of their buffers, is seen when the program hands it over (fwrite). The file that REFUSE_CONTROL names is
   shared by all processes: see `Control` in writes.py. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct control {
    int target; /* the call to refuse, from 1; 0: none */
    int error;  /* errno of the refusal */
    int count;
    char call[28]; /* what was refused, and where */
    char path[1024];
    char folder[1024];
};

static struct control *control;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("REFUSE_CONTROL");
    int file = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *memory = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory != MAP_FAILED) control = memory;
}

static int refused_path(const char *call, const char *path) {
    char full[2048];
    if (!control || !control->folder[0] || !path) return 0;
    if (path[0] != '/' && getcwd(full, 1000)) {
        strncat(full, "/", 2);
        strncat(full, path, 1000);
    } else {
        snprintf(full, sizeof full, "%s", path);
    }
    if (strncmp(full, control->folder, strlen(control->folder))) return 0;
    if (__sync_add_and_fetch(&control->count, 1) != control->target) return 0;
    snprintf(control->call, sizeof control->call, "%s", call);
    strncpy(control->path, full, sizeof control->path - 1);
    errno = control->error;
    return 1;
}

static int refused_file(const char *call, int file) {
    char link[64], path[1024];
    if (!control || !control->folder[0]) return 0;
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (size < 0) return 0;
    path[size] = 0;
    return refused_path(call, path);
}

static int makes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT; }

#define NEXT(name) \
    static __typeof__(name) *next; \
    if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define MODE(flags, last) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { \
        va_list list; \
        va_start(list, last); \
        mode = va_arg(list, mode_t); \
        va_end(list); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        NEXT(name); \
        MODE(flags, flags) \
        return makes(flags) && refused_path("open", path) ? -1 : next(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        NEXT(name); \
        MODE(flags, flags) \
        return makes(flags) && refused_path("open", path) ? -1 : next(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        NEXT(name); \
        return strpbrk(mode, "wa+") && refused_path("fopen", path) ? NULL : next(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

size_t fwrite(const void *content, size_t size, size_t count, FILE *stream) {
    NEXT(fwrite);
    return refused_file("fwrite", fileno(stream)) ? 0 : next(content, size, count, stream);
}

/* calls on an open file, by its number */
#define ON_FILE(result, name, failure, parameters, arguments) \
    result name parameters { \
        NEXT(name); \
        return refused_file(#name, file) ? (failure) : next arguments; \
    }
ON_FILE(ssize_t, write, -1, (int file, const void *content, size_t size), (file, content, size))
ON_FILE(ssize_t, pwrite, -1, (int file, const void *content, size_t size, off_t at), (file, content, size, at))
ON_FILE(ssize_t, pwrite64, -1, (int file, const void *content, size_t size, off64_t at), (file, content, size, at))
ON_FILE(ssize_t, writev, -1, (int file, const struct iovec *parts, int count), (file, parts, count))
ON_FILE(ssize_t, pwritev, -1, (int file, const struct iovec *parts, int count, off_t at), (file, parts, count, at))
ON_FILE(int, fsync, -1, (int file), (file))
ON_FILE(int, fdatasync, -1, (int file), (file))
ON_FILE(int, ftruncate, -1, (int file, off_t size), (file, size))
ON_FILE(int, ftruncate64, -1, (int file, off64_t size), (file, size))
ON_FILE(int, fallocate, -1, (int file, int mode, off_t at, off_t size), (file, mode, at, size))
ON_FILE(int, fallocate64, -1, (int file, int mode, off64_t at, off64_t size), (file, mode, at, size))
ON_FILE(int, posix_fallocate, control->error, (int file, off_t at, off_t size), (file, at, size))
ON_FILE(int, posix_fallocate64, control->error, (int file, off64_t at, off64_t size), (file, at, size))
ON_FILE(ssize_t, sendfile, -1, (int file, int from, off_t *at, size_t size), (file, from, at, size))
ON_FILE(ssize_t, sendfile64, -1, (int file, int from, off64_t *at, size_t size), (file, from, at, size))

/* calls that give a name */
#define ON_PATH(name, path, parameters, arguments) \
    int name parameters { \
        NEXT(name); \
        return refused_path(#name, path) ? -1 : next arguments; \
    }
ON_PATH(rename, to, (const char *from, const char *to), (from, to))
ON_PATH(renameat, to, (int a, const char *from, int b, const char *to), (a, from, b, to))
ON_PATH(renameat2, to, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags))
ON_PATH(mkdir, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(mkdirat, path, (int folder, const char *path, mode_t mode), (folder, path, mode))
ON_PATH(link, to, (const char *from, const char *to), (from, to))
ON_PATH(symlink, to, (const char *from, const char *to), (from, to))
