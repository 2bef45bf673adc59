/* A stand-in engine that costs next to nothing: an OpenAI-compatible HTTP/1.1 server, one thread, epoll.
 *
 *   engine [--port N] [--unix PATH]      (unknown arguments are ignored)
 *
 * Members of the request's body, which every gateway passes on, choose the response:
 *   "stream": true     an event stream, else one JSON object
 *   "max_tokens": N    chunks of the stream (default 64)
 *   "seed": N          microseconds between two chunks; 0: at full speed, EVENTS_PER_WRITE per write
 * Each chunk's text is the time of its writing in nanoseconds of CLOCK_MONOTONIC, so that a
 * reader on the same machine can compute its latency.
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
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS_PER_WRITE = 8, READ_BYTES = 256 * 1024, MAX_EVENTS = 512, EMBEDDING_BYTES = 2048 };

typedef struct Connection {
    int fd;
    int slot;                 /* in the heap of streams that wait for their time; -1: none */
    char *in;                 /* what has arrived of the request */
    size_t in_length, in_size;
    size_t head_length;       /* 0 until the head is complete */
    size_t body_length;
    size_t body_left;         /* of a body that need not be kept */
    char *out;                /* what the socket did not take */
    size_t out_length, out_done, out_size;
    int is_streaming, wants_usage, is_watching_out;
    long chunks_left, chunks;
    int64_t interval, due;    /* nanoseconds */
} Connection;

static int epoll;
static Connection **heap;
static size_t heap_length, heap_size;
static char *embeddings;
static size_t embeddings_inputs, embeddings_length;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void *checked(void *memory) {
    if (!memory) { perror("engine"); exit(1); }
    return memory;
}

/* -- streams by the time of their next chunk: a binary heap -- */

static void place(Connection *c, size_t slot) { heap[slot] = c; c->slot = (int)slot; }

static void sift(size_t slot) {
    Connection *c = heap[slot];
    while (slot > 0 && heap[(slot - 1) / 2]->due > c->due) { place(heap[(slot - 1) / 2], slot); slot = (slot - 1) / 2; }
    for (;;) {
        size_t child = 2 * slot + 1;
        if (child >= heap_length) break;
        if (child + 1 < heap_length && heap[child + 1]->due < heap[child]->due) child++;
        if (heap[child]->due >= c->due) break;
        place(heap[child], slot);
        slot = child;
    }
    place(c, slot);
}

static void push(Connection *c) {
    if (heap_length == heap_size) heap = checked(realloc(heap, (heap_size = heap_size * 2 + 64) * sizeof *heap));
    place(c, heap_length++);
    sift((size_t)c->slot);
}

static void drop(Connection *c) {
    if (c->slot < 0) return;
    size_t slot = (size_t)c->slot;
    c->slot = -1;
    Connection *last = heap[--heap_length];
    if (last != c) { place(last, slot); sift(slot); }
}

/* -- writing -- */

static void end_connection(Connection *c) {
    drop(c);
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

static void watch(Connection *c, int out) {
    if (c->is_watching_out == out) return;
    c->is_watching_out = out;
    struct epoll_event e = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &e);
}

/* 0: the connection is gone */
static int put(Connection *c, const char *data, size_t length) {
    if (c->out_length == c->out_done) {
        ssize_t sent = send(c->fd, data, length, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) { end_connection(c); return 0; }
        if (sent > 0) { data += sent; length -= (size_t)sent; }
        c->out_length = c->out_done = 0;
    }
    if (length) {
        if (c->out_length + length > c->out_size)
            c->out = checked(realloc(c->out, c->out_size = (c->out_length + length) * 2));
        memcpy(c->out + c->out_length, data, length);
        c->out_length += length;
        watch(c, 1);
    }
    return 1;
}

static size_t add_event(char *to, const char *payload, size_t length) {
    size_t n = (size_t)sprintf(to, "%zx\r\ndata: ", length + 8);
    memcpy(to + n, payload, length);
    memcpy(to + n + length, "\n\n\r\n", 4);
    return n + length + 4;
}

static size_t add_chunk(char *to) {
    char payload[256];
    int n = sprintf(payload,
                    "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"bench\","
                    "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\" %lld\"},\"finish_reason\":null}]}",
                    (long long)now());
    return add_event(to, payload, (size_t)n);
}

static size_t add_end(char *to, const Connection *c) {
    static const char last[] = "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"bench\","
                               "\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}";
    char usage[256];
    size_t n = add_event(to, last, sizeof last - 1);
    if (c->wants_usage) {
        int length = sprintf(usage,
                             "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"bench\","
                             "\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":%ld,\"total_tokens\":%ld}}",
                             c->chunks, c->chunks + 9);
        n += add_event(to + n, usage, (size_t)length);
    }
    n += add_event(to + n, "[DONE]", 6);
    memcpy(to + n, "0\r\n\r\n", 5);
    return n + 5;
}

/* 0: the connection is gone */
static int step(Connection *c) {
    char data[EVENTS_PER_WRITE * 512 + 2048];
    size_t n = 0;
    long events = c->interval ? 1 : EVENTS_PER_WRITE;
    for (; events > 0 && c->chunks_left > 0; events--, c->chunks_left--) n += add_chunk(data + n);
    if (c->chunks_left == 0) {
        n += add_end(data + n, c);
        c->is_streaming = 0;
    }
    return put(c, data, n);
}

/* -- requests -- */

static long number_of(const char *body, size_t length, const char *name, long otherwise) {
    const char *found = memmem(body, length, name, strlen(name));
    if (!found) return otherwise;
    found += strlen(name);
    while (*found == ' ' || *found == ':') found++;
    return *found >= '0' && *found <= '9' ? atol(found) : otherwise;
}

static int says(const char *body, size_t length, const char *name) {
    const char *found = memmem(body, length, name, strlen(name));
    if (!found) return 0;
    found += strlen(name);
    while (*found == ' ' || *found == ':') found++;
    return strncmp(found, "true", 4) == 0;
}

static int answer_json(Connection *c, const char *body, size_t length) {
    char head[160];
    int n = sprintf(head, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", length);
    if (length < 4096) {
        char whole[4096 + sizeof head];
        memcpy(whole, head, (size_t)n);
        memcpy(whole + n, body, length);
        return put(c, whole, (size_t)n + length);
    }
    return put(c, head, (size_t)n) && put(c, body, length);
}

/* Writes one vector per input of the body, counted by commas. */
static int answer_embeddings(Connection *c, const char *body, size_t length) {
    size_t inputs = 1;
    for (const char *p = memmem(body, length, "\"input\"", 7); p && p < body + length && *p != ']'; p++) inputs += *p == ',';
    if (inputs != embeddings_inputs) {
        embeddings = checked(realloc(embeddings, inputs * (EMBEDDING_BYTES + 64) + 256));
        size_t n = (size_t)sprintf(embeddings, "{\"object\":\"list\",\"model\":\"bench\",\"data\":[");
        for (size_t i = 0; i < inputs; i++) {
            n += (size_t)sprintf(embeddings + n, "%s{\"object\":\"embedding\",\"index\":%zu,\"embedding\":\"", i ? "," : "", i);
            memset(embeddings + n, 'A', EMBEDDING_BYTES);
            n += EMBEDDING_BYTES;
            n += (size_t)sprintf(embeddings + n, "\"}");
        }
        n += (size_t)sprintf(embeddings + n, "],\"usage\":{\"prompt_tokens\":%zu,\"total_tokens\":%zu}}", inputs, inputs);
        embeddings_inputs = inputs;
        embeddings_length = n;
    }
    return answer_json(c, embeddings, embeddings_length);
}

/* 0: the connection is gone */
static int answer(Connection *c) {
    static const char models[] = "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"created\":1,"
                                 "\"owned_by\":\"bench\",\"max_model_len\":100000000}]}";
    static const char chat[] =
        "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"bench\",\"choices\":[{\"index\":0,"
        "\"message\":{\"role\":\"assistant\",\"content\":\"Hello! How can I help you today?\"},\"finish_reason\":\"stop\"}],"
        "\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":9,\"total_tokens\":18}}";
    const char *body = c->in + c->head_length;
    size_t length = c->in_length - c->head_length;
    if (strncmp(c->in, "POST", 4) != 0) return answer_json(c, models, sizeof models - 1);
    char *line_end = memchr(c->in, '\r', c->head_length);
    if (memmem(c->in, (size_t)(line_end - c->in), "/embeddings", 11)) return answer_embeddings(c, body, length);
    if (!says(body, length, "\"stream\"")) return answer_json(c, chat, sizeof chat - 1);
    static const char head[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    if (!put(c, head, sizeof head - 1)) return 0;
    c->chunks = c->chunks_left = number_of(body, length, "\"max_tokens\"", 64);
    c->interval = number_of(body, length, "\"seed\"", 0) * 1000;
    c->wants_usage = says(body, length, "\"include_usage\"");
    c->is_streaming = 1;
    if (!c->interval) {
        while (c->is_streaming)
            if (!step(c)) return 0;
        return 1;
    }
    if (!step(c)) return 0;
    c->due = now() + c->interval;
    if (c->is_streaming) push(c);
    return 1;
}

static size_t header_number(const char *head, size_t length, const char *name) {
    for (const char *p = head; p < head + length; p++) {
        p = memchr(p, '\n', (size_t)(head + length - p));
        if (!p) break;
        if (strncasecmp(p + 1, name, strlen(name)) == 0) return strtoul(p + 1 + strlen(name), NULL, 10);
    }
    return 0;
}

/* 0: the connection is gone */
static int take(Connection *c) {
    for (;;) {
        if (!c->head_length) {
            const char *end = memmem(c->in, c->in_length, "\r\n\r\n", 4);
            if (!end) return 1;
            c->head_length = (size_t)(end - c->in) + 4;
            c->body_length = header_number(c->in, c->head_length, "content-length:");
        }
        size_t whole = c->head_length + c->body_length;
        if (c->in_length < whole || c->is_streaming) return 1;
        size_t all = c->in_length;
        c->in_length = whole;
        if (!answer(c)) return 0;
        memmove(c->in, c->in + whole, all - whole);
        c->in_length = all - whole;
        c->head_length = 0;
        if (!c->in_length) return 1;
    }
}

static void on_readable(Connection *c) {
    if (c->in_size - c->in_length < READ_BYTES && c->in_size < c->in_length + c->body_length + READ_BYTES)
        c->in = checked(realloc(c->in, c->in_size = c->in_length + c->body_length + READ_BYTES));
    ssize_t got = recv(c->fd, c->in + c->in_length, c->in_size - c->in_length - 1, 0);
    if (got <= 0) {
        if (got < 0 && errno == EAGAIN) return;
        end_connection(c);
        return;
    }
    c->in_length += (size_t)got;
    c->in[c->in_length] = 0;
    take(c);
}

static void on_writable(Connection *c) {
    ssize_t sent = send(c->fd, c->out + c->out_done, c->out_length - c->out_done, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN) end_connection(c);
        return;
    }
    c->out_done += (size_t)sent;
    if (c->out_done == c->out_length) {
        c->out_done = c->out_length = 0;
        watch(c, 0);
    }
}

static void accept_all(int listener, int is_tcp) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        int one = 1;
        if (is_tcp) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        Connection *c = checked(calloc(1, sizeof *c));
        c->fd = fd;
        c->slot = -1;
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e);
    }
}

static int listen_on(int fd, struct sockaddr *address, socklen_t length) {
    int one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, address, length) < 0 || listen(fd, 4096) < 0) { perror("engine: listen"); exit(1); }
    return fd;
}

int main(int argc, char **argv) {
    int tcp = -1, local = -1;
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 1; i + 1 < argc; i++) {
        if (strcmp(argv[i], "--port") == 0) {
            struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[i + 1]))};
            a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
            tcp = listen_on(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), (struct sockaddr *)&a, sizeof a);
        } else if (strcmp(argv[i], "--unix") == 0 || strcmp(argv[i], "--uds") == 0) {
            struct sockaddr_un a = {.sun_family = AF_UNIX};
            strncpy(a.sun_path, argv[i + 1], sizeof a.sun_path - 1);
            unlink(a.sun_path);
            local = listen_on(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), (struct sockaddr *)&a, sizeof a);
            chmod(a.sun_path, 0666);
        }
    }
    static int tcp_mark, local_mark;
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = &tcp_mark};
    if (tcp >= 0) epoll_ctl(epoll, EPOLL_CTL_ADD, tcp, &e);
    e.data.ptr = &local_mark;
    if (local >= 0) epoll_ctl(epoll, EPOLL_CTL_ADD, local, &e);
    for (;;) {
        struct epoll_event ready[MAX_EVENTS];
        int64_t wait = heap_length ? (heap[0]->due - now() + 999999) / 1000000 : -1000;
        int n = epoll_wait(epoll, ready, MAX_EVENTS, heap_length ? (wait > 0 ? (int)wait : 0) : -1);
        for (int i = 0; i < n; i++) {
            void *what = ready[i].data.ptr;
            if (what == &tcp_mark) accept_all(tcp, 1);
            else if (what == &local_mark) accept_all(local, 0);
            else if (ready[i].events & EPOLLOUT) on_writable(what);
            else on_readable(what);
        }
        int64_t time = now();
        while (heap_length && heap[0]->due <= time) {
            Connection *c = heap[0];
            if (!step(c)) continue;
            if (c->is_streaming) {
                c->due += c->interval;
                sift(0);
            } else {
                drop(c);
                if (c->in_length && !take(c)) continue;
            }
        }
    }
}
