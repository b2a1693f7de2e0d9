/* What each kind of connection does: joins, calls, answers; what it counts. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>

#include "calls.h"
#include "options.h"
#include "roles.h"
#include "run.h"

long ready_count;

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
        totals.resyncs++; /* it was behind: what it did not get is told to nobody else */
        while (client->seq < seq) {
            totals.missed++;
            client->seq++;
            event_came(client->seq);
        }
        return;
    }
    totals.delivered++;
    if (seq != client->seq + 1) {
        if (seq <= client->seq) {
            totals.repeated++;
            return;
        }
        totals.missed += seq - client->seq - 1;
    }
    client->seq = seq;
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
    totals.answered++;
    if (memmem(text, size < 180 ? size : 180, ",\"error\":{", 10)) {
        if (!totals.errors++)
            fprintf(stderr, "load: a call failed: %.*s\n", (int)size, text);
    } else if (writer->changed_group[slot] >= 0) {
        totals.changes[writer->changed_group[slot]]++;
    }
    uint64_t due = writer->sent_ns[slot];
    if (phase == MEASURING)
        counted.calls++;
    /* At a fixed rate all that were due in the measured time count, the slowest too. */
    if (rate > 0 ? phase >= MEASURING && due >= started_ns : phase == MEASURING)
        histogram_add(&counted.call, now - due);
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
    totals.invoked++;
    if (phase == MEASURING) {
        counted.invocations++;
        time_stamp(&counted.invocation, text, size, &stamp_place, now);
    }
}

void text_received(struct connection *connection, const char *text, size_t size, uint64_t now)
{
    switch (connection->role) {
    case WRITER:
        writer_got(connection, text, size, now);
        break;
    case SUBSCRIBER:
        subscriber_got(connection, text, size, now);
        break;
    case JOINER:
        joiner_got(connection, text, size, now);
        break;
    case HANDLER:
        handler_got(connection, text, size, now);
        break;
    }
}

void upgraded(struct connection *connection)
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
                "\"function_id\":\"bench::handler-%ld\","
                "\"config\":{\"stream_name\":\"bench-000000\"}}",
                connection->number, connection->number);
        }
        queue_text(connection, "{\"type\":\"ping\"}");
        break;
    default:
        send_join(connection);
        connection->asked_ns = now_ns();
    }
}
