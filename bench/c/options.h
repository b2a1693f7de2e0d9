/* The command line. */
#pragma once

/* What each is: `options.c` has the texts of --help. */
extern long worker_port, stream_port;
extern long writers, in_flight, subscribers, joiners, handlers;
extern long streams, groups, items, value_bytes;
extern long window_events, calls_max, shuffled, sample;
extern long hold, time_connecting;
extern double rate, seconds, warm_up, drain;
extern const char *operation, *window_by, *watch, *serve;

/* Set them from `--name value` pairs; ends the program when they make no sense. */
void read_options(int count, char **given);
