/* A load generator for both ports of the broker, and for the floor: one thread, one epoll loop,
 * frames prepared beforehand. It is never the bottleneck, and tells its own CPU time to show it.
 *
 *   writers      call stream::set (or another function), so many in flight each, or at a fixed rate
 *   subscribers  join a group each, check that no seq is missing, and time the events
 *   joiners      join and leave in a loop
 *   handlers     register a function with a trigger, or a stream's storage, and answer every call
 *
 * Times are CLOCK_MONOTONIC in nanoseconds. A value starts with {"at":T, T being when its call was
 * due: how old an event is can be told wherever it arrives on the same machine. At a fixed rate a
 * call is timed from when it was due, not from when it could be sent, so that a stall of the broker
 * counts for every call that it held up.
 *
 * Masking keys are zero: legal, the receiver unmasks all the same, and numbers in a prepared frame
 * can be overwritten in place. Prints one JSON object; exit code 1 with a line on stderr when
 * anything came that should not.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "calls.h"
#include "options.h"
#include "roles.h"
#include "run.h"

#define CONNECTING_MAX 64 /* handshakes at a time: a listener's queue is short */
#define WATCHED_MAX 256

enum phase phase = CONNECTING;
struct counted counted;
struct totals totals;

static int timer;
static long opened;
static struct timespec watched_before[WATCHED_MAX], watched_after[WATCHED_MAX];
static clockid_t watched_clocks[WATCHED_MAX];
static char *watched_pids[WATCHED_MAX];
static int watched;

static void add_connections(enum role role, long count)
{
    for (long number = 0; number < count; number++) {
        struct connection *connection = add_connection(role, number);
        connection->group = number % groups;
        if (role == WRITER) {
            connection->sent_ns = allocate((size_t)in_flight, sizeof *connection->sent_ns);
            connection->changed_group =
                allocate((size_t)in_flight, sizeof *connection->changed_group);
            connection->free_slots = allocate((size_t)in_flight, sizeof *connection->free_slots);
            for (long slot = in_flight; slot > 0; slot--)
                connection->free_slots[connection->free_count++] = (uint32_t)(slot - 1);
        }
    }
}

static int port_of(const struct connection *connection)
{
    bool is_worker = connection->role == WRITER || connection->role == HANDLER;
    return (int)(is_worker ? worker_port : stream_port);
}

static void watch_pids(void)
{
    char *pids = strdup(watch);
    for (char *pid = strtok(pids, ","); pid; pid = strtok(NULL, ",")) {
        if (watched == WATCHED_MAX || clock_getcpuclockid(atoi(pid), &watched_clocks[watched]))
            fail("can't watch process %s", pid);
        watched_pids[watched++] = pid;
    }
}

static void read_watched(struct timespec *times)
{
    for (int k = 0; k < watched; k++)
        if (clock_gettime(watched_clocks[k], &times[k]) < 0)
            fail("process %s ended", watched_pids[k]);
}

static double own_cpu_s(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

uint64_t started_ns;
static uint64_t ended_ns, drain_until;
static double cpu_before, cpu_after;

static void begin_measuring(uint64_t now)
{
    phase = MEASURING;
    memset(&counted, 0, sizeof counted);
    read_watched(watched_before);
    cpu_before = own_cpu_s();
    started_ns = now;
}

static void end_measuring(uint64_t now)
{
    phase = DRAINING;
    ended_ns = now;
    cpu_after = own_cpu_s();
    read_watched(watched_after);
    drain_until = now + (uint64_t)(drain * 1e9);
}

/* How many events subscribers did not get, so far, of the changes that were answered. */
static uint64_t undelivered(void)
{
    uint64_t count = 0;
    for (long k = 0; k < connection_count; k++) {
        struct connection *client = connections + k;
        if (client->role != SUBSCRIBER)
            continue;
        uint64_t due = totals.changes[client->group], came = client->seq - client->first_seq;
        if (due > came)
            count += due - came;
    }
    return count;
}

/* Whether everything came that has to: answers, and the events of what was changed. */
static bool is_drained(void)
{
    return totals.answered == totals.issued && !undelivered();
}

static void all_ready(void)
{
    if (hold) {
        poll_file(STDIN_FILENO);
        puts("ready");
        fflush(stdout);
        phase = HOLDING;
        return;
    }
    if (time_connecting) {
        end_measuring(now_ns());
        return;
    }
    uint64_t now = now_ns();
    begin_calls(now);
    if (calls_max)
        begin_measuring(now);
    else
        phase = WARMING;
    started_ns = now;
    send_calls(timer);
}

static void advance(void)
{
    uint64_t now = now_ns();
    switch (phase) {
    case CONNECTING:
        while (opened < connection_count && handshakes < CONNECTING_MAX) {
            open_connection(connections + opened, port_of(connections + opened));
            opened++;
        }
        if (ready_count == connection_count)
            all_ready();
        break;
    case WARMING:
        if (now - started_ns >= (uint64_t)(warm_up * 1e9))
            begin_measuring(now);
        break;
    case MEASURING:
        if (calls_max ? totals.answered >= (uint64_t)calls_max
                      : now - started_ns >= (uint64_t)(seconds * 1e9))
            end_measuring(now);
        break;
    case DRAINING:
        if (is_drained() || now > drain_until)
            phase = DONE;
        break;
    case HOLDING:
    case DONE:
        break;
    }
}

static void print_percentiles(const char *name, const struct histogram *histogram)
{
    if (histogram->total)
        printf(",\"%s_p50_ms\":%.4f,\"%s_p90_ms\":%.4f,\"%s_p99_ms\":%.4f,\"%s_p999_ms\":%.4f,"
               "\"%s_max_ms\":%.4f", name, histogram_ms(histogram, 0.5), name,
               histogram_ms(histogram, 0.9), name, histogram_ms(histogram, 0.99), name,
               histogram_ms(histogram, 0.999), name, histogram_ms(histogram, 1));
}

static void print_count(const char *name, uint64_t count, double took)
{
    printf(",\"%s\":%" PRIu64 ",\"%s_per_s\":%.1f", name, count, name, (double)count / took);
}

static void print_total(const char *name, uint64_t count)
{
    printf(",\"%s\":%" PRIu64, name, count);
}

static void report(void)
{
    double took = (double)(ended_ns - started_ns) / 1e9;
    printf("{\"seconds\":%.4f,\"generator_cpu_s\":%.4f", took, cpu_after - cpu_before);
    print_count("calls", counted.calls, took);
    print_count("deliveries", counted.deliveries, took);
    print_count("joins", counted.joins, took);
    print_count("invocations", counted.invocations, took);
    print_count("connections", counted.connections, took);
    print_percentiles("call", &counted.call);
    print_percentiles("delivery", &counted.delivery);
    print_percentiles("join", &counted.join);
    print_percentiles("invocation", &counted.invocation);
    print_percentiles("connection", &counted.connection);
    print_percentiles("lateness", &counted.lateness);
    print_total("errors", totals.errors);
    print_total("unanswered", totals.issued - totals.answered);
    print_total("missed", totals.missed);
    print_total("undelivered", undelivered());
    print_total("repeated", totals.repeated);
    print_total("resyncs", totals.resyncs);
    print_total("delivered_total", totals.delivered);
    print_total("issued_total", totals.issued);
    print_total("invoked_total", totals.invoked);
    print_total("received_bytes", counted.received_bytes);
    printf(",\"cpu_s\":{");
    for (int k = 0; k < watched; k++)
        printf("%s\"%s\":%.4f", k ? "," : "", watched_pids[k],
               (double)(watched_after[k].tv_sec - watched_before[k].tv_sec) +
                   (double)(watched_after[k].tv_nsec - watched_before[k].tv_nsec) / 1e9);
    puts("}}");
}

int main(int argument_count, char **arguments)
{
    read_options(argument_count, arguments);
    prepare_calls();
    watch_pids();
    totals.changes = allocate((size_t)groups, sizeof *totals.changes);
    prepare_connections((size_t)(writers + subscribers + joiners + handlers));
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    if (timer < 0)
        fail("timerfd: %s", strerror(errno));
    poll_file(timer);
    add_connections(WRITER, writers);
    add_connections(HANDLER, handlers);
    add_connections(SUBSCRIBER, subscribers);
    add_connections(JOINER, joiners);
    if (time_connecting) {
        begin_measuring(now_ns());
        phase = CONNECTING;
    }
    while (phase != DONE) {
        advance();
        flush_queued();
        if (poll_connections()) {
            if (phase == HOLDING)
                return 0; /* standard input ended */
            uint64_t times;
            if (read(timer, &times, sizeof times) < 0 && errno != EAGAIN)
                fail("timer: %s", strerror(errno));
        }
        send_calls(timer);
    }
    report();
    return totals.errors ? 1 : 0;
}
