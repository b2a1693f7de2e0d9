/* Sockets, and WebSocket frames on them. */
#pragma once
#include "basics.h"

#define HEAD_BYTES 1024 /* of a message are looked at; the rest is only counted */

enum role { WRITER, SUBSCRIBER, JOINER, HANDLER };

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

extern struct connection *connections; /* the writers first */
extern long connection_count;
extern long handshakes; /* under way */

/* Make room for so many connections, and the poller. */
void prepare_connections(size_t count);

/* Enter one that is not opened yet. */
struct connection *add_connection(enum role role, long number);

/* Connect, and ask for an upgrade. */
void open_connection(struct connection *connection, int port);

/* Have bytes, or a text frame, sent with what else this turn of the loop sends. */
void queue(struct connection *connection, const char *bytes, size_t size);
void queue_text(struct connection *connection, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* The header of a masked frame; returns its size, 14 at most. */
size_t frame_head(char *head, int opcode, size_t size);

/* Send what was queued. */
void flush_queued(void);

/* Have `poll_connections` return true when `file` can be read. */
void poll_file(int file);

/* Wait, 20 ms at most, take what came. True: a file of `poll_file` can be read. */
bool poll_connections(void);

/* What the roles do: `roles.c`. `text` has the first `HEAD_BYTES` of a longer message. */
void upgraded(struct connection *connection);
void text_received(struct connection *connection, const char *text, size_t size, uint64_t now);
