/* How packets fare between two network namespaces.
 *
 *   path CPU serve PORT             TCP: PORT echoes, PORT+1 swallows, PORT+2 greets with a byte;
 *                                   UDP: PORT echoes, PORT+1 swallows, and says to a byte how many it had
 *   path CPU tcp-rr|udp-rr A PORT N  one byte there and back, N times: the median in microseconds
 *   path CPU connect A PORT N        connection and first byte, N times: the median in microseconds
 *   path CPU tcp A PORT N            what a stream carries: Gbit/s
 *   path CPU udp A PORT N            what arrives of datagrams of 64 bytes: thousands a second
 *
 * Rates are those that a tenth of N spells of 5 ms exceeds: other work on the machine can only slow a spell down. Each
 * end stays on processor CPU. A server ends with its parent. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ECHO, SWALLOW, GREET, WAIT_SECONDS = 2, DATAGRAM = 64, MANY = 64, SPELL = 5000 };

static char buffer[1 << 18];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static void stay_on(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("sched_setaffinity");
}

static struct sockaddr_in at(const char *address, int port) {
    struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, address, &place.sin_addr) != 1) {
        errno = EINVAL;
        fail(address);
    }
    return place;
}

/* The server */

static int bound(int type, int port) {
    struct sockaddr_in place = at("0.0.0.0", port);
    int handle = socket(AF_INET, type, 0), one = 1, room = 8 << 20;
    setsockopt(handle, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (type == SOCK_DGRAM)
        setsockopt(handle, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    if (bind(handle, (void *)&place, sizeof place) || (type == SOCK_STREAM && listen(handle, 1024)))
        fail("bind");
    return handle;
}

static void watch(int poll, int handle, int kind) {
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)kind << 32 | (uint32_t)handle};
    if (epoll_ctl(poll, EPOLL_CTL_ADD, handle, &event))
        fail("epoll_ctl");
}

static void take_datagrams(int handle, int kind) {
    static uint64_t had;
    struct sockaddr_in from;
    for (int left = MANY; left; left--) {
        socklen_t size = sizeof from;
        ssize_t got = recvfrom(handle, buffer, sizeof buffer, MSG_DONTWAIT, (void *)&from, &size);
        if (got < 0)
            return;
        if (kind == ECHO) {
            sendto(handle, buffer, got, 0, (void *)&from, size);
        } else if (got == 1) {
            sendto(handle, &had, sizeof had, 0, (void *)&from, size);
        } else {
            had++;
        }
    }
}

static void serve(int port) {
    enum { LISTENER = 8, DATAGRAMS = 16 };
    int poll = epoll_create1(0), one = 1;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int kind = ECHO; kind <= GREET; kind++)
        watch(poll, bound(SOCK_STREAM, port + kind), LISTENER | kind);
    for (int kind = ECHO; kind <= SWALLOW; kind++)
        watch(poll, bound(SOCK_DGRAM, port + kind), DATAGRAMS | kind);
    for (;;) {
        struct epoll_event events[MANY];
        int count = epoll_wait(poll, events, MANY, -1);
        for (int number = 0; number < count; number++) {
            int handle = (uint32_t)events[number].data.u64, kind = events[number].data.u64 >> 32;
            if (kind & DATAGRAMS) {
                take_datagrams(handle, kind & 3);
            } else if (kind & LISTENER) {
                int made = accept(handle, NULL, NULL);
                if (made < 0)
                    continue;
                setsockopt(made, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                watch(poll, made, kind & 3);
                if ((kind & 3) == GREET)
                    send(made, "!", 1, MSG_NOSIGNAL);
            } else {
                ssize_t got = recv(handle, buffer, sizeof buffer, 0);
                if (got <= 0)
                    close(handle);
                else if (kind == ECHO)
                    send(handle, buffer, got, MSG_NOSIGNAL);
            }
        }
    }
}

/* The client */

static int connected(int type, const char *address, int port) {
    struct sockaddr_in place = at(address, port);
    struct timeval patience = {.tv_sec = WAIT_SECONDS};
    /* A reset instead of a farewell leaves no socket behind that waits for a minute. */
    struct linger reset = {.l_onoff = 1};
    int handle = socket(AF_INET, type, 0), one = 1;
    setsockopt(handle, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(handle, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (type == SOCK_STREAM) {
        setsockopt(handle, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        setsockopt(handle, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
    if (connect(handle, (void *)&place, sizeof place))
        fail("connect");
    return handle;
}

static int ascending(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double quantile(double *values, int count, double part) {
    qsort(values, count, sizeof *values, ascending);
    return values[(int)(part * count)];
}

static double round_trip(int type, const char *address, int port, int count) {
    double *times = calloc(count, sizeof *times);
    int handle = connected(type, address, port + ECHO);
    char byte = 'x';
    for (int number = 0; number < count; number++) {
        double start = now();
        if (send(handle, &byte, 1, 0) != 1 || recv(handle, &byte, 1, 0) != 1)
            fail("round trip");
        times[number] = now() - start;
    }
    return quantile(times, count, 0.5);
}

static double connection(const char *address, int port, int count) {
    double *times = calloc(count, sizeof *times);
    char byte;
    for (int number = 0; number < count; number++) {
        double start = now();
        int handle = connected(SOCK_STREAM, address, port + GREET);
        if (recv(handle, &byte, 1, 0) != 1)
            fail("first byte");
        times[number] = now() - start;
        close(handle);
    }
    return quantile(times, count, 0.5);
}

static double acknowledged(int handle) {
    struct tcp_info info;
    socklen_t size = sizeof info;
    if (getsockopt(handle, IPPROTO_TCP, TCP_INFO, &info, &size))
        fail("TCP_INFO");
    return info.tcpi_bytes_acked;
}

static double stream(const char *address, int port, int spells) {
    double *rates = calloc(spells, sizeof *rates);
    int handle = connected(SOCK_STREAM, address, port + SWALLOW);
    for (int number = 0; number < spells; number++) {
        double before = acknowledged(handle), start = now(), took;
        do
            if (send(handle, buffer, sizeof buffer, 0) < 0)
                fail("stream");
        while ((took = now() - start) < SPELL);
        rates[number] = (acknowledged(handle) - before) * 8 / took / 1e3;
    }
    return quantile(rates, spells, 0.9);
}

static uint64_t had(int handle) {
    uint64_t count;
    /* The question can be lost in the flood before it. */
    for (int tries = 3; tries; tries--)
        if (send(handle, "?", 1, 0) == 1 && recv(handle, &count, sizeof count, 0) == sizeof count)
            return count;
    fail("count");
    return 0;
}

static double datagrams(const char *address, int port, int spells) {
    double *rates = calloc(spells, sizeof *rates);
    int handle = connected(SOCK_DGRAM, address, port + SWALLOW);
    for (int number = 0; number < spells; number++) {
        double before = had(handle), start = now();
        do
            for (int left = MANY; left; left--)
                send(handle, buffer, DATAGRAM, 0);
        while (now() - start < SPELL);
        /* Its answer comes when all that arrived before it is counted. */
        double arrived = had(handle) - before;
        rates[number] = arrived / (now() - start) * 1e3;
    }
    return quantile(rates, spells, 0.9);
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "path CPU serve PORT | path CPU tcp-rr|udp-rr|connect|tcp|udp ADDRESS PORT AMOUNT\n");
        return 2;
    }
    const char *verb = argv[2];
    stay_on(atoi(argv[1]));
    if (!strcmp(verb, "serve"))
        serve(atoi(argv[3]));
    if (argc != 6)
        return 2;
    const char *address = argv[3];
    int port = atoi(argv[4]), amount = atoi(argv[5]);
    double result = !strcmp(verb, "tcp-rr")    ? round_trip(SOCK_STREAM, address, port, amount)
                    : !strcmp(verb, "udp-rr")  ? round_trip(SOCK_DGRAM, address, port, amount)
                    : !strcmp(verb, "connect") ? connection(address, port, amount)
                    : !strcmp(verb, "tcp")     ? stream(address, port, amount)
                                               : datagrams(address, port, amount);
    printf("%.6g\n", result);
    return 0;
}
