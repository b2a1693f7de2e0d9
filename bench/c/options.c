#include "options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "basics.h"

long worker_port, stream_port;
long writers, in_flight = 1, subscribers, joiners, handlers;
long streams = 1, groups = 1, items = 1000, value_bytes = 128;
long window_events, calls_max, shuffled, sample = 1;
long hold, time_connecting;
double rate, seconds = 3, warm_up = 1, drain = 10;
const char *operation = "set", *window_by = "deliveries", *watch = "", *serve = "";

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
    {"window", &window_events, NULL, NULL, "events under way; then one for each that came to all"},
    {"window-by", NULL, NULL, &window_by, "deliveries, or invocations of handlers"},
    {"joiners", &joiners, NULL, NULL, "connections that join and leave"},
    {"handlers", &handlers, NULL, NULL, "workers with a stream trigger each"},
    {"serve", NULL, NULL, &serve, "handlers serve this stream's storage instead"},
    {"seconds", NULL, &seconds, NULL, "measured"},
    {"warm-up", NULL, &warm_up, NULL, "seconds before"},
    {"drain", NULL, &drain, NULL, "seconds that what is under way at the end may take"},
    {"watch", NULL, NULL, &watch, "pids, with commas, whose CPU time is told"},
    {"hold", &hold, NULL, NULL, "1: print ready when all are, stay till standard input ends"},
    {"connecting", &time_connecting, NULL, NULL, "1: measure until all are connected, no longer"},
};

void read_options(int count, char **given)
{
    size_t known = sizeof options / sizeof *options;
    if (count == 2 && strcmp(given[1], "--help") == 0) {
        for (size_t k = 0; k < known; k++)
            printf("--%-12s %s\n", options[k].name, options[k].help);
        exit(0);
    }
    for (int n = 1; n < count; n += 2) {
        size_t k = 0;
        const char *name = strncmp(given[n], "--", 2) == 0 ? given[n] + 2 : "";
        while (k < known && strcmp(name, options[k].name) != 0)
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
