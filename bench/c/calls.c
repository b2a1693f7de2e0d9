#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>

#include "options.h"
#include "run.h"

struct call {
    char *frame;
    size_t size;
    char *connection, *slot, *stream, *group, *item, *stamp; /* digits within; NULL: has none */
};

static struct call set_call, get_call, update_call, send_call;
char *value;

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

void prepare_calls(void)
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

void issue(struct connection *writer, uint64_t due)
{
    uint64_t number = totals.issued++, total = (uint64_t)groups * (uint64_t)items;
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

static uint32_t *came; /* to how many subscribers an event came, by its number modulo the size */
static uint64_t came_mask, completed, next_due;
uint64_t events_base;

void begin_calls(uint64_t now)
{
    next_due = now;
    if (!window_events || !subscribers || window_by[0] != 'd')
        return;
    uint64_t size = 1;
    while (size < 4 * (uint64_t)window_events)
        size *= 2;
    came = allocate(size, sizeof *came);
    came_mask = size - 1;
}

void event_came(uint64_t seq)
{
    if (!came)
        return;
    uint64_t number = seq - events_base - 1;
    if (++came[number & came_mask] == (uint32_t)subscribers)
        while (came[completed & came_mask] == (uint32_t)subscribers) {
            came[completed & came_mask] = 0;
            completed++;
        }
}

bool is_running(void)
{
    return (phase == WARMING || phase == MEASURING) &&
           (!calls_max || totals.issued < (uint64_t)calls_max);
}

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

static void arm_timer(int timer, uint64_t at)
{
    struct itimerspec when = {.it_value = {(time_t)(at / NS), (long)(at % NS)}};
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL) < 0)
        fail("timerfd_settime: %s", strerror(errno));
}

void send_calls(int timer)
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
            arm_timer(timer, next_due);
        return;
    }
    uint64_t *done = &completed;
    if (window_events && window_by[0] == 'i')
        done = &totals.invoked;
    while (is_running() && (!window_events || totals.issued - *done < (uint64_t)window_events) &&
           (writer = free_writer()))
        issue(writer, now);
}
