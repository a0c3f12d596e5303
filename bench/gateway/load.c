/* Both ends of a gateway benchmark in one small program, so that neither is ever the bottleneck.
 *
 *   load backend PORT CHUNKS RATE          an engine: JSON at once, or CHUNKS SSE events at RATE per second and stream
 *   load client  PORT CONNS SECONDS RATE BODYFILE HEADER [REQUESTS]
 *                                          RATE 0: closed loop (saturation); else an open loop of RATE requests a second,
 *                                          latency counted from the moment a request was due
 * The client prints one JSON line. Both are single threads on epoll; loopback only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_SAMPLES 4000000
#define MAX_FDS 65536

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
  perror(what);
  exit(1);
}

/* Writes everything; both ends' messages are small against socket buffers, so waiting here is rare and short. */
static int send_all(int fd, const char *data, size_t size) {
  while (size) {
    ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EAGAIN) {
        usleep(50);
        continue;
      }
      return -1;
    }
    data += n;
    size -= (size_t)n;
  }
  return 0;
}

/* --- backend ---------------------------------------------------------------------------------------------------- */

struct peer {
  char *in;
  size_t have, room;
  int streaming, sent;
  uint64_t due;
};

static struct peer peers[MAX_FDS];
static const char USAGE[] = "{\"prompt_tokens\":123,\"total_tokens\":187,\"completion_tokens\":64,\"prompt_tokens_details\":null}";
static char json_answer[2048];
static size_t json_size;

static void backend_answer(int ep, int fd, struct peer *p, int chunks, double rate, int usage) {
  (void)ep;
  if (!p->streaming) {
    if (send_all(fd, json_answer, json_size)) close(fd);
    return;
  }
  static const char head[] =
      "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
  send_all(fd, head, sizeof head - 1);
  p->sent = 0;
  (void)chunks;
  (void)usage;
  p->due = now_ns() + (uint64_t)(1e9 / rate);
}

static int backend_chunk(int fd, struct peer *p, int chunks, double rate) {
  char event[512], out[1200];
  int size;
  if (p->sent < chunks) {
    size = snprintf(event, sizeof event,
                    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"qwen-7b\","
                    "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"@%llu\"},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]}\n\n",
                    (unsigned long long)now_ns());
    size = snprintf(out, sizeof out, "%x\r\n%s\r\n", size, event);
  } else {
    size = snprintf(event, sizeof event,
                    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"qwen-7b\","
                    "\"choices\":[],\"usage\":{\"prompt_tokens\":123,\"total_tokens\":%d,\"completion_tokens\":%d}}\n\n"
                    "data: [DONE]\n\n",
                    123 + chunks, chunks);
    size = snprintf(out, sizeof out, "%x\r\n%s\r\n0\r\n\r\n", size, event);
    p->streaming = 0;
  }
  p->sent++;
  p->due += (uint64_t)(1e9 / rate);
  return send_all(fd, out, (size_t)size);
}

/* One request at a time per connection, as a proxy sends them. Returns 1 when a whole request stood in the buffer. */
static int take_request(struct peer *p) {
  char *end = memmem(p->in, p->have, "\r\n\r\n", 4);
  if (!end) return 0;
  size_t head = (size_t)(end - p->in) + 4, body = 0;
  int chunked = 0;
  for (char *line = p->in; line < end;) {
    char *stop = memmem(line, (size_t)(end + 2 - line), "\r\n", 2);
    if (!strncasecmp(line, "content-length:", 15)) body = strtoul(line + 15, NULL, 10);
    if (!strncasecmp(line, "transfer-encoding:", 18)) chunked = 1;
    line = stop + 2;
  }
  size_t whole = head + body;
  if (chunked) {
    char *last = memmem(p->in + head, p->have - head, "0\r\n\r\n", 5);
    if (!last) return 0;
    whole = (size_t)(last - p->in) + 5;
  }
  if (p->have < whole) return 0;
  size_t look = whole - head < 4096 ? whole - head : 4096;
  p->streaming = memmem(p->in + head, look, "\"stream\":true", 13) != NULL;
  memmove(p->in, p->in + whole, p->have - whole);
  p->have -= whole;
  return 1;
}

static void backend(int port, int chunks, double rate) {
  char body[1024];
  int size = snprintf(body, sizeof body,
                      "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"qwen-7b\",\"choices\":[{\"index\":0,"
                      "\"message\":{\"role\":\"assistant\",\"content\":\"%0280d\"},\"finish_reason\":\"stop\"}],\"usage\":%s}",
                      7, USAGE);
  json_size = (size_t)snprintf(json_answer, sizeof json_answer,
                               "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s", size, body);
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1, ep = epoll_create1(0);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4096)) die("listen");
  socklen_t length = sizeof at;
  getsockname(listener, (struct sockaddr *)&at, &length);
  printf("{\"port\": %d}\n", ntohs(at.sin_port));
  fflush(stdout);
  struct epoll_event ev = {.events = EPOLLIN, .data.fd = listener}, got[512];
  epoll_ctl(ep, EPOLL_CTL_ADD, listener, &ev);
  static int active[MAX_FDS];
  int count = 0;
  for (;;) {
    int wait = -1;
    if (count) {
      uint64_t t = now_ns(), next = UINT64_MAX;
      for (int i = 0; i < count; i++) {
        int fd = active[i];
        struct peer *p = &peers[fd];
        while (p->streaming && p->due <= t)
          if (backend_chunk(fd, p, chunks, rate)) p->streaming = 0;
        if (!p->streaming) {
          active[i--] = active[--count];
        } else if (p->due < next) {
          next = p->due;
        }
      }
      if (count) wait = next <= t ? 0 : (int)((next - t) / 1000000) + 1;
    }
    int n = epoll_wait(ep, got, 512, wait);
    for (int i = 0; i < n; i++) {
      int fd = got[i].data.fd;
      if (fd == listener) {
        for (int c; (c = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
          if (c >= MAX_FDS) {
            close(c);
            continue;
          }
          setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
          peers[c].have = 0;
          peers[c].streaming = 0;
          ev.events = EPOLLIN;
          ev.data.fd = c;
          epoll_ctl(ep, EPOLL_CTL_ADD, c, &ev);
        }
        continue;
      }
      struct peer *p = &peers[fd];
      int gone = 0;
      for (;;) {
        if (p->room - p->have < 65536) {
          p->room = p->room ? p->room * 2 : 131072;
          p->in = realloc(p->in, p->room);
        }
        ssize_t r = recv(fd, p->in + p->have, p->room - p->have, 0);
        if (r > 0) {
          p->have += (size_t)r;
          continue;
        }
        gone = r == 0 || errno != EAGAIN;
        break;
      }
      if (gone) {
        p->streaming = 0;
        close(fd);
        continue;
      }
      if (!p->streaming && take_request(p)) {
        backend_answer(ep, fd, p, chunks, rate, 1);
        if (p->streaming) active[count++] = fd;
      }
    }
  }
}

/* --- client ----------------------------------------------------------------------------------------------------- */

struct conn {
  int fd, busy, status, chunked, head_done;
  uint64_t due;
  size_t left;
  char tail[8];
};

static uint32_t *samples, *chunk_samples;
static size_t sample_count, chunk_count_sampled;
static uint64_t chunks_seen, bytes_seen, ok, refused, failed;
static char *request;
static size_t request_size;
static struct conn *conns;
static int conn_count, target_port;

static int by_value(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return (x > y) - (x < y);
}

static uint32_t quantile(uint32_t *values, size_t n, double q) {
  return n ? values[(size_t)((double)(n - 1) * q)] : 0;
}

static void open_conn(int ep, int i) {
  struct conn *c = &conns[i];
  int one = 1;
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)target_port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (connect(c->fd, (struct sockaddr *)&at, sizeof at)) die("connect");
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  struct epoll_event ev = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
  epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &ev);
  c->busy = 0;
}

static void fire(int i, uint64_t due) {
  struct conn *c = &conns[i];
  c->busy = 1;
  c->due = due;
  c->status = c->chunked = c->head_done = 0;
  c->left = 0;
  memset(c->tail, 0, sizeof c->tail);
  send_all(c->fd, request, request_size);
}

/* Feeds answer bytes; returns 1 at the answer's end. Relies on one answer at a time per connection. */
static int feed(struct conn *c, char *data, size_t size, uint64_t t) {
  bytes_seen += size;
  char *at = data, *end = data + size;
  if (!c->head_done) {
    char *stop = memmem(data, size, "\r\n\r\n", 4);
    if (!stop) return 0; /* heads are small: they come whole */
    c->status = atoi(data + 9);
    c->chunked = memmem(data, (size_t)(stop - data), "chunked", 7) != NULL;
    char *length = strcasestr(data, "content-length:");
    c->left = length && length < stop ? strtoul(length + 15, NULL, 10) : 0;
    c->head_done = 1;
    at = stop + 4;
  }
  for (char *p = at; (p = memmem(p, (size_t)(end - p), "\"@", 2)); p += 2) {
    chunks_seen++;
    uint64_t sent = strtoull(p + 2, NULL, 10);
    if (chunk_count_sampled < MAX_SAMPLES && t > sent) chunk_samples[chunk_count_sampled++] = (uint32_t)((t - sent) / 1000);
  }
  if (!c->chunked) {
    size_t n = (size_t)(end - at);
    c->left -= n < c->left ? n : c->left;
    return c->left == 0;
  }
  size_t n = (size_t)(end - at), keep = n < 5 ? n : 5;
  memmove(c->tail, c->tail + keep, 5 - keep);
  memcpy(c->tail + 5 - keep, end - keep, keep);
  return !memcmp(c->tail, "0\r\n\r\n", 5);
}

static void client(int port, int count, double seconds, double rate, const char *file, const char *header, long limit) {
  static char body[64 << 20];
  FILE *f = fopen(file, "rb");
  if (!f) die(file);
  size_t body_size = fread(body, 1, sizeof body, f);
  fclose(f);
  request = malloc(body_size + 4096);
  request_size = (size_t)sprintf(request,
                                 "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
                                 "accept: */*\r\nuser-agent: bench/1\r\n%s\r\ncontent-length: %zu\r\n\r\n",
                                 header, body_size);
  memcpy(request + request_size, body, body_size);
  request_size += body_size;
  samples = malloc(sizeof *samples * MAX_SAMPLES);
  chunk_samples = malloc(sizeof *chunk_samples * MAX_SAMPLES);
  conns = calloc((size_t)count, sizeof *conns);
  conn_count = count;
  target_port = port;
  int ep = epoll_create1(0);
  for (int i = 0; i < count; i++) open_conn(ep, i);
  uint64_t start = now_ns(), stop = start + (uint64_t)(seconds * 1e9), sent = 0;
  int *idle = malloc(sizeof *idle * (size_t)count), idles = 0;
  for (int i = 0; i < count; i++) {
    if (rate == 0 && (!limit || (long)sent < limit)) {
      fire(i, now_ns());
      sent++;
    } else {
      idle[idles++] = i;
    }
  }
  struct epoll_event got[256];
  static char buffer[1 << 20];
  uint64_t t = now_ns();
  while (t < stop) {
    int wait = 100;
    if (rate > 0) {
      uint64_t due;
      while (idles && (due = start + (uint64_t)((double)sent * 1e9 / rate)) <= t) {
        fire(idle[--idles], due);
        sent++;
      }
      due = start + (uint64_t)((double)sent * 1e9 / rate);
      wait = due > t + 1000000 ? (int)((due - t) / 1000000) : 0;
      /* below a millisecond: sleep by nanosleep, so that a waiting client burns no core */
      if (!wait && due > t) {
        struct timespec nap = {0, (long)(due - t > 200000 ? 200000 : due - t)};
        struct epoll_event none;
        (void)none;
        if (due - t > 60000) nanosleep(&nap, NULL);
      }
    }
    int n = epoll_wait(ep, got, 256, wait);
    t = now_ns();
    for (int k = 0; k < n; k++) {
      int i = (int)got[k].data.u32;
      struct conn *c = &conns[i];
      ssize_t r = recv(c->fd, buffer, sizeof buffer - 1, MSG_DONTWAIT);
      if (r < 0 && errno == EAGAIN) continue;
      if (r <= 0) {
        if (c->busy) failed++;
        close(c->fd);
        open_conn(ep, i);
      } else {
        buffer[r] = 0;
        if (!feed(c, buffer, (size_t)r, t)) continue;
        if (c->status == 200) ok++;
        else refused++;
        if (sample_count < MAX_SAMPLES) samples[sample_count++] = (uint32_t)((t - c->due) / 1000);
      }
      if (rate == 0 && (!limit || (long)sent < limit)) {
        fire(i, now_ns());
        sent++;
      } else {
        c->busy = 0;
        idle[idles++] = i;
        if (limit && (long)sent >= limit && idles == count) stop = t;
      }
    }
  }
  double took = (double)(now_ns() - start) / 1e9;
  qsort(samples, sample_count, sizeof *samples, by_value);
  qsort(chunk_samples, chunk_count_sampled, sizeof *chunk_samples, by_value);
  printf("{\"seconds\": %.3f, \"ok\": %llu, \"refused\": %llu, \"failed\": %llu, \"bytes\": %llu, \"p50_us\": %u, \"p99_us\": %u, "
         "\"chunks\": %llu, \"chunk_p50_us\": %u, \"chunk_p99_us\": %u}\n",
         took, (unsigned long long)ok, (unsigned long long)refused, (unsigned long long)failed, (unsigned long long)bytes_seen,
         quantile(samples, sample_count, 0.5), quantile(samples, sample_count, 0.99), (unsigned long long)chunks_seen,
         quantile(chunk_samples, chunk_count_sampled, 0.5), quantile(chunk_samples, chunk_count_sampled, 0.99));
}

int main(int argc, char **argv) {
  struct rlimit files = {MAX_FDS, MAX_FDS};
  setrlimit(RLIMIT_NOFILE, &files);
  if (argc == 5 && !strcmp(argv[1], "backend")) backend(atoi(argv[2]), atoi(argv[3]), atof(argv[4]));
  else if (argc >= 8 && !strcmp(argv[1], "client"))
    client(atoi(argv[2]), atoi(argv[3]), atof(argv[4]), atof(argv[5]), argv[6], argv[7], argc > 8 ? atol(argv[8]) : 0);
  else {
    fprintf(stderr, "usage: load backend PORT CHUNKS RATE | load client PORT CONNS SECONDS RATE BODYFILE HEADER [REQUESTS]\n");
    return 2;
  }
  return 0;
}
