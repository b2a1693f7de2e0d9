/* How far the run is, and what was counted. */
#pragma once
#include "histogram.h"

enum phase { CONNECTING, HOLDING, WARMING, MEASURING, DRAINING, DONE };

extern enum phase phase;

extern uint64_t started_ns; /* when the measured time began */

/* Of the measured time. */
extern struct counted {
    uint64_t calls, deliveries, joins, invocations, connections, received_bytes;
    struct histogram call, delivery, join, invocation, connection, lateness;
} counted;

/* From first to last, to see that nothing was lost. missed: events skipped by a greater seq. */
extern struct totals {
    uint64_t issued, answered, invoked, errors, missed, repeated, resyncs, delivered;
    uint64_t *changes; /* by group: the answered calls that make an event */
} totals;
