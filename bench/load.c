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
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define HEAD_BYTES 1024      /* of a message are looked at; the rest is only counted */
#define READ_BYTES (256 * 1024)
#define CONNECTING_MAX 64    /* handshakes at a time: a listener's queue is short */
#define WATCHED_MAX 256
#define NS 1000000000ULL
#define STAMP_BASE NS * NS   /* so that a stamp has 19 digits, whenever the machine was started */

enum role { WRITER, SUBSCRIBER, JOINER, HANDLER };
enum phase { CONNECTING, HOLDING, WARMING, MEASURING, DRAINING, DONE };

/* ---- options ---- */

static long worker_port, stream_port;
static long writers = 0, in_flight = 1, subscribers = 0, joiners = 0, handlers = 0;
static long streams = 1, groups = 1, items = 1000, value_bytes = 128;
static long window_events = 0, calls_max = 0, shuffled = 0, sample = 1;
static long hold = 0, time_connecting = 0;
static double rate = 0, seconds = 3, warm_up = 1, drain = 10;
static const char *operation = "set", *window_by = "deliveries", *watch = "", *serve = "";

static const struct {
    const char *name;
    long *integer;
    double *number;
    const char **text;
    const char *help;
} options[] = {
    {"worker-port", &worker_port, NULL, NULL, "of 127.0.0.1"},
    {"stream-port", &stream_port, NULL, NULL, "of 127.0.0.1"},
    {"writers", &writers, NULL, NULL, "connections that call"},
    {"in-flight", &in_flight, NULL, NULL, "calls that each has under way at most"},
    {"operation", NULL, NULL, &operation, "set, get, update, send, mixed (5 get, 4 set, 1 update)"},
    {"rate", NULL, &rate, NULL, "calls a second of all writers, sent whether answered or not"},
    {"calls", &calls_max, NULL, NULL, "stop after so many, without a warm-up"},
    {"streams", &streams, NULL, NULL, "group G is in stream G modulo this"},
    {"groups", &groups, NULL, NULL, "that calls and subscribers are spread over"},
    {"items", &items, NULL, NULL, "of each group that calls are spread over"},
    {"value-bytes", &value_bytes, NULL, NULL, "of each value, at least 40"},
    {"shuffled", &shuffled, NULL, NULL, "1: items in an order of no locality"},
    {"subscribers", &subscribers, NULL, NULL, "connections that each join a group"},
    {"sample", &sample, NULL, NULL, "every so many subscribers times its events"},
    {"window", &window_events, NULL, NULL, "events under way: the next when the oldest came everywhere"},
    {"window-by", NULL, NULL, &window_by, "deliveries, or invocations of handlers"},
    {"joiners", &joiners, NULL, NULL, "connections that join and leave"},
    {"handlers", &handlers, NULL, NULL, "workers with a stream trigger each"},
    {"serve", NULL, NULL, &serve, "handlers serve this stream's storage instead"},
    {"seconds", NULL, &seconds, NULL, "measured"},
    {"warm-up", NULL, &warm_up, NULL, "seconds before"},
    {"drain", NULL, &drain, NULL, "seconds that what is under way at the end may take"},
    {"watch", NULL, NULL, &watch, "pids, with commas, whose CPU time is told"},
    {"hold", &hold, NULL, NULL, "1: when all are connected print ready; stay till standard input ends"},
    {"connecting", &time_connecting, NULL, NULL, "1: measure until all are connected, no longer"},
};

static void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static void read_options(int count, char **given)
{
    size_t known = sizeof options / sizeof *options;
    if (count == 2 && strcmp(given[1], "--help") == 0) {
        for (size_t k = 0; k < known; k++)
            printf("--%-12s %s\n", options[k].name, options[k].help);
        exit(0);
    }
    for (int n = 1; n < count; n += 2) {
        size_t k = 0;
        while (k < known && strcmp(given[n] + 2 * !strncmp(given[n], "--", 2), options[k].name) != 0)
            k++;
        if (k == known || n + 1 == count)
            fail("unknown option, or one without a value: %s", given[n]);
        char *end = "";
        if (options[k].integer)
            *options[k].integer = strtol(given[n + 1], &end, 10);
        else if (options[k].number)
            *options[k].number = strtod(given[n + 1], &end);
        else
            *options[k].text = given[n + 1];
        if (*end)
            fail("--%s is not a number: %s", options[k].name, given[n + 1]);
    }
    if (groups < 1 || items < 1 || streams < 1 || in_flight < 1 || sample < 1 || value_bytes < 40)
        fail("groups, items, streams, in-flight and sample are at least 1, value-bytes 40");
    if (value_bytes > 60000)
        fail("value-bytes is at most 60000");
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS + (uint64_t)now.tv_nsec;
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        fail("out of memory");
    return memory;
}

/* ---- histograms: exact below 128 ns, then 64 buckets for every doubling, so within 1.6 % ---- */

struct histogram {
    uint64_t total;
    uint64_t counts[64 * 60];
};

static void histogram_add(struct histogram *histogram, uint64_t value)
{
    unsigned shift = value < 128 ? 0 : 57 - (unsigned)__builtin_clzll(value);
    histogram->counts[shift * 64 + (value >> shift)]++;
    histogram->total++;
}

static double histogram_ms(const struct histogram *histogram, double quantile)
{
    uint64_t below = (uint64_t)(quantile * (double)histogram->total), seen = 0;
    size_t size = sizeof histogram->counts / sizeof *histogram->counts;
    for (size_t bucket = 0; bucket < size; bucket++) {
        seen += histogram->counts[bucket];
        if (seen > below || (seen && seen == histogram->total)) {
            unsigned shift = bucket < 128 ? 0 : (unsigned)(bucket / 64) - 1;
            uint64_t low = (uint64_t)(bucket - shift * 64) << shift;
            return ((double)low + (double)(1ULL << shift) / 2) / 1e6;
        }
    }
    return 0;
}

/* ---- what is counted in the measured time ---- */

static struct {
    uint64_t calls, errors, deliveries, joins, invocations, connections, received_bytes;
    struct histogram call, delivery, join, invocation, connection, lateness;
} counted;

/* What is counted from first to last, to see that nothing was lost. */
static uint64_t issued, answered, invoked, missed, repeated, resyncs, delivered_total;
static uint64_t *changes; /* by group: the answered calls that make an event */

static enum phase phase = CONNECTING;

/* ---- connections ---- */

struct connection {
    int fd;
    enum role role;
    bool upgraded, ready, wants_write, is_dirty;
    long number; /* among those of its role */
    long group;
    char *out;
    size_t out_size, out_capacity;
    char *held; /* the beginning of a message that is still to come, its header included */
    size_t held_size;
    uint64_t skip; /* bytes of that message that are not held */
    uint64_t seq, first_seq, opened_ns, asked_ns;
    uint64_t *sent_ns;  /* of each call under way, by its slot */
    long *changed_group; /* by the slot; -1: changes none */
    uint32_t *free_slots, free_count;
};

static struct connection *connections;
static long connection_count, opened, ready_count, handshakes;
static long *dirty, dirty_count;
static int poller, timer;
static struct timespec watched_before[WATCHED_MAX], watched_after[WATCHED_MAX];
static clockid_t watched_clocks[WATCHED_MAX];
static char *watched_pids[WATCHED_MAX];
static int watched;

static void queue(struct connection *connection, const char *bytes, size_t size)
{
    if (connection->out_size + size > connection->out_capacity) {
        connection->out_capacity = (connection->out_size + size) * 2;
        connection->out = realloc(connection->out, connection->out_capacity);
        if (!connection->out)
            fail("out of memory");
    }
    memcpy(connection->out + connection->out_size, bytes, size);
    connection->out_size += size;
    if (!connection->is_dirty) {
        connection->is_dirty = true;
        dirty[dirty_count++] = connection - connections;
    }
}

static void listen_to(struct connection *connection, bool writable)
{
    struct epoll_event event = {.events = EPOLLIN | (writable ? EPOLLOUT : 0), .data.ptr = connection};
    connection->wants_write = writable;
    if (epoll_ctl(poller, EPOLL_CTL_MOD, connection->fd, &event) < 0)
        fail("epoll_ctl: %s", strerror(errno));
}

static void flush(struct connection *connection)
{
    connection->is_dirty = false;
    ssize_t sent = send(connection->fd, connection->out, connection->out_size,
                        MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN)
        fail("send: %s", strerror(errno));
    if (sent > 0) {
        connection->out_size -= (size_t)sent;
        memmove(connection->out, connection->out + sent, connection->out_size);
    }
    if ((connection->out_size > 0) != connection->wants_write)
        listen_to(connection, connection->out_size > 0);
    if (!connection->out_size && connection->role == SUBSCRIBER) { /* it will hardly send again */
        free(connection->out);
        connection->out = NULL;
        connection->out_capacity = 0;
    }
}

/* ---- frames ---- */

/* The header of a masked frame; returns its size. */
static size_t frame_head(char *head, int opcode, size_t size)
{
    size_t length = 0;
    head[length++] = (char)(0x80 | opcode);
    if (size < 126) {
        head[length++] = (char)(0x80 | size);
    } else {
        head[length++] = (char)(0x80 | 126);
        head[length++] = (char)(size >> 8);
        head[length++] = (char)size;
    }
    memset(head + length, 0, 4);
    return length + 4;
}

static void queue_frame(struct connection *connection, int opcode, const char *payload, size_t size)
{
    char head[14];
    queue(connection, head, frame_head(head, opcode, size));
    queue(connection, payload, size);
}

static void queue_text(struct connection *connection, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static void queue_text(struct connection *connection, const char *format, ...)
{
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    int size = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (size < 0 || (size_t)size >= sizeof text)
        fail("message too long");
    queue_frame(connection, 1, text, (size_t)size);
}

/* ---- calls ---- */

struct call {
    char *frame;
    size_t size;
    char *connection, *slot, *stream, *group, *item, *stamp; /* digits within; NULL: has none */
};

static struct call set_call, get_call, update_call, send_call;
static char *value; /* as text, for what handlers answer */

static void put_digits(char *end, uint64_t number, int width)
{
    while (width-- > 0) {
        *--end = (char)('0' + number % 10);
        number /= 10;
    }
}

/* A call whose digits are found by the letters that stand for them in `format`. */
static struct call prepare(const char *function, const char *format)
{
    char *payload = allocate(1, strlen(format) + (size_t)value_bytes + 256), *frame;
    size_t size = (size_t)sprintf(payload,
        "{\"type\":\"invokefunction\",\"invocation_id\":\"CCCCCCCC-0000-4000-8000-SSSSSSSSSSSS\","
        "\"function_id\":\"%s\",\"data\":{\"stream_name\":\"%s\",\"group_id\":\"group-GGGGGGGG\",",
        function, *serve ? serve : "bench-TTTTTT");
    size += (size_t)sprintf(payload + size, format, value);
    frame = allocate(1, size + 14);
    size_t head = frame_head(frame, 1, size);
    memcpy(frame + head, payload, size);
    free(payload);
    struct call call = {.frame = frame, .size = head + size};
    call.connection = memmem(frame, call.size, "CCCCCCCC", 8);
    call.slot = memmem(frame, call.size, "SSSSSSSSSSSS", 12);
    call.stream = memmem(frame, call.size, "TTTTTT", 6);
    call.group = memmem(frame, call.size, "GGGGGGGG", 8);
    call.item = memmem(frame, call.size, "IIIIIIII", 8);
    call.stamp = memmem(frame, call.size, "AAAAAAAAAAAAAAAAAAA", 19);
    return call;
}

static void prepare_calls(void)
{
    value = allocate(1, (size_t)value_bytes + 1);
    int head = sprintf(value, "{\"at\":AAAAAAAAAAAAAAAAAAA,\"x\":\"");
    memset(value + head, 'x', (size_t)value_bytes - (size_t)head);
    memcpy(value + value_bytes - 2, "\"}", 2);
    set_call = prepare("stream::set", "\"item_id\":\"item-IIIIIIII\",\"data\":%s}}");
    get_call = prepare("stream::get", "\"item_id\":\"item-IIIIIIII\"}}");
    update_call = prepare("stream::update", "\"item_id\":\"item-IIIIIIII\",\"ops\":["
        "{\"type\":\"increment\",\"path\":\"n\",\"by\":1},"
        "{\"type\":\"set\",\"path\":\"at\",\"value\":AAAAAAAAAAAAAAAAAAA}]}}");
    send_call = prepare("stream::send", "\"type\":\"ping\",\"data\":%s}}");
    char *stamp = strstr(value, "AAAA");
    put_digits(stamp + 19, STAMP_BASE, 19);
}

static struct call *next_call(uint64_t number)
{
    switch (operation[0]) {
    case 'm':
        return number % 10 < 5 ? &get_call : number % 10 < 9 ? &set_call : &update_call;
    case 'g':
        return &get_call;
    case 'u':
        return &update_call;
    default:
        return operation[1] == 'e' && operation[2] == 'n' ? &send_call : &set_call;
    }
}

/* Send one more call over a writer with a free slot, due at `due`. */
static void issue(struct connection *writer, uint64_t due)
{
    uint64_t number = issued++, total = (uint64_t)groups * (uint64_t)items;
    uint64_t place = number % total;
    if (shuffled) /* a fixed permutation of an even spread: the prime divides no total used here */
        place = place * 2654435761ULL % total;
    uint32_t slot = writer->free_slots[--writer->free_count];
    struct call *call = next_call(number);
    put_digits(call->connection + 8, (uint64_t)writer->number, 8);
    put_digits(call->slot + 12, slot, 12);
    if (call->stream)
        put_digits(call->stream + 6, place % (uint64_t)groups % (uint64_t)streams, 6);
    put_digits(call->group + 8, place % (uint64_t)groups, 8);
    if (call->item)
        put_digits(call->item + 8, place / (uint64_t)groups, 8);
    if (call->stamp)
        put_digits(call->stamp + 19, STAMP_BASE + due, 19);
    writer->sent_ns[slot] = due;
    writer->changed_group[slot] = call == &get_call ? -1 : (long)(place % (uint64_t)groups);
    queue(writer, call->frame, call->size);
}

/* ---- events under way to subscribers, or to handlers ---- */

static uint32_t *came; /* to how many subscribers an event came, by its number modulo the size */
static uint64_t came_mask, completed, events_base;

static void event_came(uint64_t seq)
{
    uint64_t number = seq - events_base - 1;
    if (++came[number & came_mask] == (uint32_t)subscribers)
        while (came[completed & came_mask] == (uint32_t)subscribers) {
            came[completed & came_mask] = 0;
            completed++;
        }
}

static bool is_running(void)
{
    return (phase == WARMING || phase == MEASURING) && (!calls_max || issued < (uint64_t)calls_max);
}

static uint64_t next_due;
static long next_writer;

static struct connection *free_writer(void)
{
    for (long tried = 0; tried < writers; tried++) {
        struct connection *writer = connections + next_writer;
        next_writer = (next_writer + 1) % writers;
        if (writer->free_count)
            return writer;
    }
    return NULL;
}

static void arm_timer(uint64_t at)
{
    struct itimerspec when = {.it_value = {(time_t)(at / NS), (long)(at % NS)}};
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL) < 0)
        fail("timerfd_settime: %s", strerror(errno));
}

/* Send what is due, or what the window has room for. */
static void send_calls(void)
{
    if (!writers || !is_running())
        return;
    struct connection *writer;
    uint64_t now = now_ns();
    if (rate > 0) {
        while (next_due <= now && is_running() && (writer = free_writer())) {
            if (phase == MEASURING)
                histogram_add(&counted.lateness, now - next_due);
            issue(writer, next_due);
            next_due += (uint64_t)(1e9 / rate);
        }
        if (next_due > now)
            arm_timer(next_due);
        return;
    }
    uint64_t *done = &completed;
    if (window_events && window_by[0] == 'i')
        done = &invoked;
    while (is_running() && (!window_events || issued - *done < (uint64_t)window_events) &&
           (writer = free_writer()))
        issue(writer, now);
}

/* ---- messages ---- */

static bool starts_with(const char *text, size_t size, const char *beginning)
{
    size_t length = strlen(beginning);
    return size >= length && memcmp(text, beginning, length) == 0;
}

static uint64_t read_number(const char *text, const char *end)
{
    uint64_t number = 0;
    while (text < end && *text >= '0' && *text <= '9')
        number = number * 10 + (uint64_t)(*text++ - '0');
    return number;
}

/* What stands after `key`; looked for first where it was the last time. */
static const char *after(const char *text, size_t size, const char *key, size_t *where)
{
    size_t length = strlen(key);
    if (*where + length <= size && memcmp(text + *where, key, length) == 0)
        return text + *where + length;
    const char *found = memmem(text, size, key, length);
    if (!found)
        return NULL;
    *where = (size_t)(found - text);
    return found + length;
}

static void become_ready(struct connection *connection)
{
    connection->ready = true;
    ready_count++;
    handshakes--;
    if (time_connecting) {
        counted.connections++;
        histogram_add(&counted.connection, now_ns() - connection->opened_ns);
    }
}

static void time_stamp(struct histogram *histogram, const char *text, size_t size, size_t *where,
                       uint64_t now)
{
    const char *stamp = after(text, size, "\"at\":", where);
    uint64_t at = stamp ? read_number(stamp, text + size) - STAMP_BASE : 0;
    if (at && at <= now)
        histogram_add(histogram, now - at);
}

static void send_join(struct connection *connection)
{
    queue_text(connection,
        "{\"type\":\"join\",\"data\":{\"subscriptionId\":\"s\",\"streamName\":\"bench-%06ld\","
        "\"groupId\":\"group-%08ld\"}}", connection->group % streams, connection->group);
}

static void send_leave(struct connection *connection)
{
    queue_text(connection,
        "{\"type\":\"leave\",\"data\":{\"subscriptionId\":\"s\",\"streamName\":\"bench-%06ld\","
        "\"groupId\":\"group-%08ld\"}}", connection->group % streams, connection->group);
}

static void subscriber_got(struct connection *client, const char *text, size_t size, uint64_t now)
{
    static size_t seq_place, stamp_place;
    const char *end = text + size, *digits = after(text, size, ",\"seq\":", &seq_place);
    if (!digits)
        fail("an event without seq: %.*s", (int)size, text);
    uint64_t seq = read_number(digits, end);
    while (digits < end && *digits >= '0' && *digits <= '9')
        digits++;
    if (starts_with(digits, (size_t)(end - digits), ",\"epoch\"")) { /* a sync */
        if (!client->ready) {
            client->first_seq = client->seq = seq;
            events_base = seq;
            become_ready(client);
            return;
        }
        resyncs++; /* it was behind: what it did not get is told to nobody else */
        while (client->seq < seq) {
            missed++;
            client->seq++;
            if (came)
                event_came(client->seq);
        }
        return;
    }
    delivered_total++;
    if (seq != client->seq + 1) {
        if (seq <= client->seq) {
            repeated++;
            return;
        }
        missed += seq - client->seq - 1;
    }
    client->seq = seq;
    if (came)
        event_came(seq);
    if (phase == MEASURING) {
        counted.deliveries++;
        if (client->number % sample == 0)
            time_stamp(&counted.delivery, text, size, &stamp_place, now);
    }
}

static void joiner_got(struct connection *client, const char *text, size_t size, uint64_t now)
{
    if (!memmem(text, size < 400 ? size : 400, "\"type\":\"sync\"", 13))
        fail("a join was answered with %.*s", (int)size, text);
    if (!client->ready)
        become_ready(client);
    if (phase == MEASURING) {
        counted.joins++;
        histogram_add(&counted.join, now - client->asked_ns);
    }
    if (phase > MEASURING)
        return;
    send_leave(client);
    client->group = (client->group + joiners) % groups;
    send_join(client);
    client->asked_ns = now;
}

static const char RESULT[] = "{\"type\":\"invocationresult\",\"invocation_id\":\"";

static void writer_got(struct connection *writer, const char *text, size_t size, uint64_t now)
{
    if (!starts_with(text, size, RESULT))
        return; /* the greeting */
    const char *id = text + sizeof RESULT - 1;
    uint64_t slot = read_number(id + 24, text + size);
    if (slot >= (uint64_t)in_flight || !writer->sent_ns[slot])
        fail("an answer to no call: %.*s", (int)size, text);
    answered++;
    if (memmem(text, size < 180 ? size : 180, ",\"error\":{", 10)) {
        if (!counted.errors++)
            fprintf(stderr, "load: a call failed: %.*s\n", (int)size, text);
    } else if (writer->changed_group[slot] >= 0) {
        changes[writer->changed_group[slot]]++;
    }
    if (phase == MEASURING) {
        counted.calls++;
        histogram_add(&counted.call, now - writer->sent_ns[slot]);
    }
    writer->sent_ns[slot] = 0;
    writer->free_slots[writer->free_count++] = (uint32_t)slot;
    if (rate <= 0 && !window_events && is_running())
        issue(writer, now);
}

static void handler_got(struct connection *handler, const char *text, size_t size, uint64_t now)
{
    static size_t stamp_place;
    static const char call[] = "{\"type\":\"invokefunction\",\"invocation_id\":\"";
    if (starts_with(text, size, "{\"type\":\"pong\"") && !handler->ready)
        become_ready(handler);
    if (starts_with(text, size, "{\"type\":\"triggerregistrationresult\"") ||
        starts_with(text, size, "{\"type\":\"registrationrejected\""))
        fail("refused: %.*s", (int)size, text);
    if (!starts_with(text, size, call))
        return;
    const char *id = text + sizeof call - 1;
    const char *id_end = memchr(id, '"', size - sizeof call + 1);
    const char *function = memmem(text, size, "\"function_id\":\"", 15);
    if (!id_end || !function)
        fail("no call: %.*s", (int)size, text);
    function += 15;
    size_t left = size - (size_t)(function - text);
    const char *before = "null", *result = "", *rest = "";
    if (starts_with(function, left, "stream::set(")) {
        before = "{\"old_value\":null,\"new_value\":";
        result = value;
        rest = "}";
    } else if (starts_with(function, left, "stream::get(")) {
        before = "";
        result = value;
    }
    queue_text(handler, "%s%.*s\",\"function_id\":\"h\",\"result\":%s%s%s}", RESULT,
               (int)(id_end - id), id, before, result, rest);
    invoked++;
    if (phase == MEASURING) {
        counted.invocations++;
        time_stamp(&counted.invocation, text, size, &stamp_place, now);
    }
}

static void message_received(struct connection *connection, int opcode, const char *text,
                             size_t size, uint64_t now)
{
    if (opcode == 9)
        queue_frame(connection, 10, text, size);
    else if (opcode == 8)
        fail("closed by the server: %.*s", size > 2 ? (int)size - 2 : 0, text + 2);
    else if (opcode == 10)
        return;
    else if (connection->role == WRITER)
        writer_got(connection, text, size, now);
    else if (connection->role == SUBSCRIBER)
        subscriber_got(connection, text, size, now);
    else if (connection->role == JOINER)
        joiner_got(connection, text, size, now);
    else
        handler_got(connection, text, size, now);
}

/* ---- bytes ---- */

static void upgraded(struct connection *connection)
{
    connection->upgraded = true;
    switch (connection->role) {
    case WRITER:
        become_ready(connection);
        break;
    case HANDLER:
        for (int get = 0; get < 2 && *serve; get++)
            queue_text(connection, "{\"type\":\"registerfunction\",\"id\":\"stream::%s(%s)\"}",
                       get ? "get" : "set", serve);
        if (!*serve) {
            queue_text(connection, "{\"type\":\"registerfunction\",\"id\":\"bench::handler-%ld\"}",
                       connection->number);
            queue_text(connection,
                "{\"type\":\"registertrigger\",\"id\":\"trigger-%ld\",\"trigger_type\":\"stream\","
                "\"function_id\":\"bench::handler-%ld\",\"config\":{\"stream_name\":\"bench-000000\"}}",
                connection->number, connection->number);
        }
        queue_text(connection, "{\"type\":\"ping\"}");
        break;
    default:
        send_join(connection);
        connection->asked_ns = now_ns();
    }
}

/* Split the bytes at `data`; returns how many of them are done with. */
static size_t take_frames(struct connection *connection, const char *data, size_t size, uint64_t now)
{
    size_t position = 0;
    if (!connection->upgraded) {
        const char *end = memmem(data, size, "\r\n\r\n", 4);
        if (!end)
            return 0;
        if (!starts_with(data, size, "HTTP/1.1 101"))
            fail("not upgraded: %.*s", (int)size, data);
        upgraded(connection);
        position = (size_t)(end - data) + 4;
    }
    while (size - position >= 2) {
        const unsigned char *frame = (const unsigned char *)data + position;
        size_t head = 2, left = size - position;
        uint64_t length = frame[1];
        if (length == 126) {
            head = 4;
            length = left < head ? 0 : (uint64_t)frame[2] << 8 | frame[3];
        } else if (length == 127) {
            head = 10;
            length = 0;
            for (size_t k = 2; k < head && left >= head; k++)
                length = length << 8 | frame[k];
        } else if (length > 127) {
            fail("a masked frame from the server");
        }
        if (left < head || (left - head < length && left - head < HEAD_BYTES))
            break;
        if (!(frame[0] & 0x80))
            fail("a fragmented message");
        if (left - head < length) { /* enough came to look at; wait for the end of it */
            if (!connection->held)
                connection->held = allocate(1, HEAD_BYTES + 16);
            memcpy(connection->held, frame, head + HEAD_BYTES);
            connection->held_size = head + HEAD_BYTES;
            connection->skip = length - (left - head);
            return size;
        }
        message_received(connection, frame[0] & 15, data + position + head,
                         length < HEAD_BYTES ? length : HEAD_BYTES, now);
        position += head + length;
    }
    return position;
}

static char read_buffer[HEAD_BYTES + 16 + READ_BYTES];

static void readable(struct connection *connection)
{
    /* What was left over of the last read is put before the next. */
    size_t kept = connection->skip ? 0 : connection->held_size;
    memcpy(read_buffer, connection->held ? connection->held : "", kept);
    ssize_t got = recv(connection->fd, read_buffer + kept, READ_BYTES, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0)
        fail("connection lost: %s", got ? strerror(errno) : "closed without a close frame");
    uint64_t now = now_ns();
    counted.received_bytes += (uint64_t)got;
    size_t size = kept + (size_t)got, position = 0;
    if (connection->skip) {
        if (connection->skip > size) {
            connection->skip -= size;
            return;
        }
        position = connection->skip;
        connection->skip = 0;
        size_t head = connection->held_size - HEAD_BYTES;
        connection->held_size = 0;
        message_received(connection, connection->held[0] & 15, connection->held + head, HEAD_BYTES, now);
    }
    position += take_frames(connection, read_buffer + position, size - position, now);
    if (connection->skip)
        return;
    connection->held_size = size - position;
    if (connection->held_size) {
        if (connection->held_size > HEAD_BYTES + 16)
            fail("a head of more than %d bytes", HEAD_BYTES);
        if (!connection->held)
            connection->held = allocate(1, HEAD_BYTES + 16);
        memcpy(connection->held, read_buffer + position, connection->held_size);
    }
}

/* ---- the course of a run ---- */

static void open_connection(struct connection *connection)
{
    bool is_worker = connection->role == WRITER || connection->role == HANDLER;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    address.sin_port = htons((uint16_t)(is_worker ? worker_port : stream_port));
    connection->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connection->fd < 0)
        fail("socket: %s", strerror(errno));
    if (connect(connection->fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail("connect to port %d: %s", ntohs(address.sin_port), strerror(errno));
    int on = 1;
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, connection->fd, &event) < 0)
        fail("epoll_ctl: %s", strerror(errno));
    static const char request[] =
        "GET / HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    queue(connection, request, sizeof request - 1);
    connection->opened_ns = now_ns();
    handshakes++;
}

static void add_connections(enum role role, long count)
{
    for (long number = 0; number < count; number++) {
        struct connection *connection = connections + connection_count++;
        connection->role = role;
        connection->number = number;
        connection->group = number % groups;
        if (role == WRITER) {
            connection->sent_ns = allocate((size_t)in_flight, sizeof *connection->sent_ns);
            connection->changed_group = allocate((size_t)in_flight, sizeof *connection->changed_group);
            connection->free_slots = allocate((size_t)in_flight, sizeof *connection->free_slots);
            for (long slot = in_flight; slot > 0; slot--)
                connection->free_slots[connection->free_count++] = (uint32_t)(slot - 1);
        }
    }
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

static uint64_t started_ns, ended_ns, drain_until;
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
        if (client->role == SUBSCRIBER && changes[client->group] > client->seq - client->first_seq)
            count += changes[client->group] - (client->seq - client->first_seq);
    }
    return count;
}

/* Whether everything came that has to: answers, and the events of what was changed. */
static bool is_drained(void)
{
    return answered == issued && !undelivered();
}

static void all_ready(void)
{
    if (hold) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &hold};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, STDIN_FILENO, &event) < 0)
            fail("standard input has to be a pipe: %s", strerror(errno));
        puts("ready");
        fflush(stdout);
        phase = HOLDING;
        return;
    }
    if (time_connecting) {
        end_measuring(now_ns());
        return;
    }
    if (window_events && subscribers && window_by[0] == 'd') {
        uint64_t size = 1;
        while (size < 4 * (uint64_t)window_events)
            size *= 2;
        came = allocate(size, sizeof *came);
        came_mask = size - 1;
    }
    uint64_t now = now_ns();
    next_due = now;
    if (calls_max)
        begin_measuring(now);
    else
        phase = WARMING;
    started_ns = now;
    send_calls();
}

static void advance(void)
{
    uint64_t now = now_ns();
    switch (phase) {
    case CONNECTING:
        while (opened < connection_count && handshakes < CONNECTING_MAX)
            open_connection(connections + opened++);
        if (ready_count == connection_count)
            all_ready();
        break;
    case WARMING:
        if (now - started_ns >= (uint64_t)(warm_up * 1e9))
            begin_measuring(now);
        break;
    case MEASURING:
        if (calls_max ? answered >= (uint64_t)calls_max : now - started_ns >= (uint64_t)(seconds * 1e9))
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
    printf(",\"errors\":%" PRIu64 ",\"unanswered\":%" PRIu64 ",\"missed\":%" PRIu64
           ",\"undelivered\":%" PRIu64
           ",\"repeated\":%" PRIu64 ",\"resyncs\":%" PRIu64 ",\"delivered_total\":%" PRIu64
           ",\"issued_total\":%" PRIu64 ",\"invoked_total\":%" PRIu64 ",\"received_bytes\":%" PRIu64,
           counted.errors, issued - answered, missed, undelivered(), repeated, resyncs, delivered_total, issued,
           invoked, counted.received_bytes);
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
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    poller = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event timer_event = {.events = EPOLLIN, .data.ptr = NULL};
    if (poller < 0 || timer < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, timer, &timer_event) < 0)
        fail("epoll: %s", strerror(errno));
    prepare_calls();
    watch_pids();
    changes = allocate((size_t)groups, sizeof *changes);
    size_t total = (size_t)(writers + subscribers + joiners + handlers);
    connections = allocate(total + 1, sizeof *connections);
    dirty = allocate(total + 1, sizeof *dirty);
    add_connections(WRITER, writers);
    add_connections(HANDLER, handlers);
    add_connections(SUBSCRIBER, subscribers);
    add_connections(JOINER, joiners);
    static struct epoll_event events[1024];
    if (time_connecting) {
        begin_measuring(now_ns());
        phase = CONNECTING;
    }
    while (phase != DONE) {
        advance();
        for (long k = 0; k < dirty_count; k++)
            flush(connections + dirty[k]);
        dirty_count = 0;
        int count = epoll_wait(poller, events, 1024, 20);
        if (count < 0 && errno != EINTR)
            fail("epoll_wait: %s", strerror(errno));
        for (int k = 0; k < count; k++) {
            struct connection *connection = events[k].data.ptr;
            if (events[k].data.ptr == &hold)
                return 0;
            if (!connection) {
                uint64_t times;
                if (read(timer, &times, sizeof times) < 0 && errno != EAGAIN)
                    fail("timer: %s", strerror(errno));
                continue;
            }
            if (events[k].events & EPOLLOUT)
                flush(connection);
            if (events[k].events & ~(uint32_t)EPOLLOUT)
                readable(connection);
        }
        send_calls();
    }
    report();
    return counted.errors ? 1 : 0;
}
