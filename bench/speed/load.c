/* A cheap load generator: one thread, epoll, requests written beforehand.
 *
 *   load PORT CONNECTIONS SECONDS WARMUP_SECONDS SPREAD_US REQUEST_FILE...
 *
 * Each connection sends the request of a file (head and body), reads the response to its end, and repeats.
 * With a SPREAD_US above 0 the connections start one after the other, evenly within that time: neither their requests nor
 * their chunks arrive together. Counting begins after the warm-up; requests in flight at the end count what had arrived.
 * Prints one JSON object. Times are microseconds; `transit` is from the engine's write of a chunk to the read here
 * (see engine.c), `jitter` the difference of the transits of two consecutive chunks.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { READ_BYTES = 1024 * 1024, MAX_EVENTS = 512, KEPT = 512 };

typedef struct {
    uint32_t *values;
    size_t length, size;
} Samples;

typedef struct {
    char *bytes;
    size_t length;
} Request;

typedef enum { HEAD, SIZED, CHUNK_SIZE, CHUNK_DATA, CHUNK_END } State;

typedef struct {
    int fd;
    const Request *request;
    State state;
    char head[16384];        /* the answer's head; then the line of a chunk's size */
    size_t head_length;
    size_t left;             /* of a sized body or of a chunk */
    int status, is_stream, is_closing, has_first, has_done, is_open;
    char tail[KEPT];         /* end of the last read: a mark may be cut in two */
    size_t tail_length;
    size_t sent;
    int64_t started, last_transit;
} Connection;

static int epoll, port;
static char buffer[KEPT + READ_BYTES];
static int64_t begin, end_at;
static Samples latency, first, transit, jitter;
static long requests, errors, reconnects, chunks;
static long long bytes;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void note(Samples *s, int64_t nanoseconds) {
    if (s->length == s->size) {
        s->size = s->size * 2 + 65536;
        s->values = realloc(s->values, s->size * sizeof *s->values);
        if (!s->values) { perror("load"); exit(1); }
    }
    int64_t us = nanoseconds / 1000;
    s->values[s->length++] = us < 0 ? 0 : us > UINT32_MAX ? UINT32_MAX : (uint32_t)us;
}

static void open_connection(Connection *c) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->is_open = connect(c->fd, (struct sockaddr *)&a, sizeof a) == 0;
    if (!c->is_open) { close(c->fd); return; }
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &e);
}

static void close_connection(Connection *c) {
    close(c->fd);
    c->is_open = 0;
}

static void write_more(Connection *c) {
    const Request *r = c->request;
    while (c->sent < r->length) {
        ssize_t n = send(c->fd, r->bytes + c->sent, r->length - c->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) break;
        c->sent += (size_t)n;
    }
    struct epoll_event e = {.events = EPOLLIN | (c->sent < r->length ? EPOLLOUT : 0), .data.ptr = c};
    if (r->length > 65536) epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &e);
}

static void start(Connection *c) {
    if (!c->is_open) open_connection(c);
    if (!c->is_open) return;
    c->state = HEAD;
    c->head_length = c->sent = c->tail_length = 0;
    c->has_first = c->has_done = 0;
    c->last_transit = -1;
    c->started = now();
    write_more(c);
}

static void finish(Connection *c, int64_t time, int is_good) {
    if (time >= begin) {
        if (is_good) {
            requests++;
            note(&latency, time - c->started);
        } else errors++;
    }
    if (c->is_closing || !is_good) {
        close_connection(c);
        reconnects++;
    }
    if (time < end_at) start(c);
}

/* Scans a piece of a stream's body. Marks cut by a read are found with the tail of the previous one. */
static void look(Connection *c, char *data, size_t length, int64_t time) {
    char *p = data - c->tail_length, *stop = data + length;
    memcpy(p, c->tail, c->tail_length);
    char *keep = p;
    for (;;) {
        char *found = memmem(p, (size_t)(stop - p), "\"content\":", 10);
        if (!found) break;
        char *digits = found + 10;
        while (digits < stop && (*digits == ' ' || *digits == '"')) digits++;
        char *after = digits;
        int64_t written = 0;
        while (after < stop && *after >= '0' && *after <= '9') written = written * 10 + (*after++ - '0');
        if (after == stop) { keep = found; goto cut; }
        p = keep = after;
        if (written < 1000000) continue;  /* not a time: a text of another kind */
        int64_t under_way = time - written;
        if (!c->has_first) {
            c->has_first = 1;
            if (time >= begin) note(&first, time - c->started);
        }
        if (time >= begin && time < end_at) {
            chunks++;
            note(&transit, under_way);
            if (c->last_transit >= 0) note(&jitter, llabs(under_way - c->last_transit));
        }
        c->last_transit = under_way;
    }
    if (memmem(p, (size_t)(stop - p), "[DONE]", 6)) c->has_done = 1;
    if (stop - keep > 16) keep = stop - 16;
cut:
    c->tail_length = (size_t)(stop - keep) < KEPT ? (size_t)(stop - keep) : 0;
    memcpy(c->tail, keep, c->tail_length);
}

static const char *header(const char *head, const char *name) {
    for (const char *line = head; (line = strchr(line, '\n')); ) {
        line++;
        if (strncasecmp(line, name, strlen(name)) == 0) return line + strlen(name);
    }
    return NULL;
}

static int read_head(Connection *c) {
    const char *length = header(c->head, "content-length:"), *closing = header(c->head, "connection:");
    const char *type = header(c->head, "content-type:"), *coding = header(c->head, "transfer-encoding:");
    c->status = atoi(c->head + 9);
    c->is_stream = type && strncmp(type + strspn(type, " "), "text/event-stream", 17) == 0;
    c->is_closing = closing && strncasecmp(closing + strspn(closing, " "), "close", 5) == 0;
    c->left = length ? strtoul(length, NULL, 10) : 0;
    c->head_length = 0;
    c->state = coding ? CHUNK_SIZE : SIZED;
    return length || coding;
}

static int is_good(const Connection *c) { return c->status == 200 && (!c->is_stream || (c->has_first && c->has_done)); }

/* 0: the response has ended, with or without an error */
static int take(Connection *c, char *data, size_t length, int64_t time) {
    char *stop = data + length;
    while (data < stop || (c->state == SIZED && c->left == 0)) {
        size_t here = (size_t)(stop - data);
        switch (c->state) {
        case HEAD: {
            size_t room = sizeof c->head - 1 - c->head_length, n = here < room ? here : room;
            size_t before = c->head_length;
            memcpy(c->head + before, data, n);
            c->head[before + n] = 0;
            char *end = strstr(c->head + (before > 3 ? before - 3 : 0), "\r\n\r\n");
            if (!end) {
                c->head_length += n;
                if (n == room) { finish(c, time, 0); return 0; }
                return 1;
            }
            data += (size_t)(end + 4 - c->head) - before;
            end[2] = 0;
            if (!read_head(c)) { finish(c, time, 0); return 0; }
            break;
        }
        case SIZED:
        case CHUNK_DATA: {
            size_t n = here < c->left ? here : c->left;
            if (c->is_stream && n) {
                char saved[KEPT];
                size_t kept = c->tail_length;
                memcpy(saved, data - kept, kept);
                look(c, data, n, time);
                memcpy(data - kept, saved, kept);
            }
            if (time >= begin) bytes += (long long)n;
            c->left -= n;
            data += n;
            if (c->left) return 1;
            if (c->state == SIZED) { finish(c, time, is_good(c)); return 0; }
            c->state = CHUNK_SIZE;
            c->head_length = 0;
            c->left = 2;  /* the line's end that follows the data */
            break;
        }
        case CHUNK_SIZE:
            while (data < stop && c->head_length < 64) {
                char ch = *data++;
                if (c->left) { c->left--; continue; }
                if (ch == '\n') {
                    c->head[c->head_length] = 0;
                    c->left = strtoul(c->head, NULL, 16);
                    c->state = c->left ? CHUNK_DATA : CHUNK_END;
                    c->head_length = 0;
                    if (!c->left) c->left = 2;
                    break;
                }
                c->head[c->head_length++] = ch;
            }
            if (c->head_length >= 64) { finish(c, time, 0); return 0; }
            break;
        case CHUNK_END: {
            size_t n = here < c->left ? here : c->left;
            c->left -= n;
            data += n;
            if (!c->left) { finish(c, time, is_good(c)); return 0; }
            break;
        }
        }
    }
    return 1;
}

static void on_readable(Connection *c) {
    char *data = buffer + KEPT;
    ssize_t n = recv(c->fd, data, READ_BYTES, MSG_DONTWAIT);
    int64_t time = now();
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) { c->is_closing = 1; finish(c, time, 0); return; }
    take(c, data, (size_t)n, time);
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static void show(const char *name, Samples *s) {
    qsort(s->values, s->length, sizeof *s->values, by_value);
    size_t n = s->length;
    printf(", \"%s_p50_us\": %u, \"%s_p99_us\": %u", name, n ? s->values[n / 2] : 0, name, n ? s->values[n * 99 / 100] : 0);
}

static int read_request(const char *path, Request *r) {
    FILE *file = fopen(path, "rb");
    if (!file) return 0;
    fseek(file, 0, SEEK_END);
    r->length = (size_t)ftell(file);
    rewind(file);
    r->bytes = malloc(r->length);
    int is_read = fread(r->bytes, 1, r->length, file) == r->length;
    fclose(file);
    return is_read;
}

int main(int argc, char **argv) {
    if (argc < 7) { fprintf(stderr, "load PORT CONNECTIONS SECONDS WARMUP_SECONDS SPREAD_US REQUEST_FILE...\n"); return 2; }
    signal(SIGPIPE, SIG_IGN);
    port = atoi(argv[1]);
    int count = atoi(argv[2]);
    double seconds = atof(argv[3]), warmup = atof(argv[4]);
    int64_t spread = atoll(argv[5]) * 1000;
    Request *all = calloc((size_t)argc, sizeof *all);
    for (int i = 6; i < argc; i++)
        if (!read_request(argv[i], &all[i - 6])) { perror(argv[i]); return 2; }

    epoll = epoll_create1(EPOLL_CLOEXEC);
    Connection *connections = calloc((size_t)count, sizeof *connections);
    for (int i = 0; i < count; i++) connections[i].request = &all[i % (argc - 6)];
    int64_t start_at = now();
    begin = start_at + (int64_t)(warmup * 1e9);
    end_at = begin + (int64_t)(seconds * 1e9);
    int started = 0;
    for (;;) {
        int64_t time = now();
        if (time >= end_at) break;
        while (started < count && time - start_at >= spread * started / count) start(&connections[started++]);
        struct epoll_event ready[MAX_EVENTS];
        int n = epoll_wait(epoll, ready, MAX_EVENTS, started < count ? 0 : 10);
        for (int i = 0; i < n; i++) {
            if (ready[i].events & EPOLLOUT) write_more(ready[i].data.ptr);
            if (ready[i].events & ~EPOLLOUT) on_readable(ready[i].data.ptr);
        }
        /* Reconnect connections that failed. */
        if (n == 0)
            for (int i = 0; i < started; i++)
                if (!connections[i].is_open) { errors += time >= begin; start(&connections[i]); }
    }
    double measured = (double)(now() - begin) / 1e9;
    printf("{\"requests\": %ld, \"errors\": %ld, \"reconnects\": %ld, \"chunks\": %ld, \"bytes\": %lld, \"seconds\": %.3f",
           requests, errors, reconnects, chunks, bytes, measured);
    show("latency", &latency);
    show("first", &first);
    show("transit", &transit);
    show("jitter", &jitter);
    printf("}\n");
    return 0;
}
