/* Calls of writers: prepared, sent when they are due, and what is under way of them. */
#pragma once
#include "connection.h"

#define STAMP_BASE (NS * NS) /* so that a stamp has 19 digits, whenever the machine was started */

extern char *value; /* as text */
extern uint64_t events_base; /* the seq before the first event */

void prepare_calls(void);

/* Calls may be sent from now on. */
void begin_calls(uint64_t now);

/* Whether calls are sent at all at this point of the run. */
bool is_running(void);

/* Send what is due, or what the window has room for. At a fixed rate `timer` is set to the next. */
void send_calls(int timer);

/* Send one more call over a writer with a free slot, due at `due`. */
void issue(struct connection *writer, uint64_t due);

/* A subscriber got the event with that seq, or learnt that it never will. */
void event_came(uint64_t seq);
