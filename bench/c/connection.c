#define _GNU_SOURCE
#include "connection.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>

#include "run.h"

#define READ_BYTES (256 * 1024)

struct connection *connections;
long connection_count, handshakes;
static long *dirty, dirty_count;
static int poller;

void prepare_connections(size_t count)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    connections = allocate(count + 1, sizeof *connections);
    dirty = allocate(count + 1, sizeof *dirty);
    poller = epoll_create1(0);
    if (poller < 0)
        fail("epoll: %s", strerror(errno));
}

struct connection *add_connection(enum role role, long number)
{
    struct connection *connection = connections + connection_count++;
    connection->role = role;
    connection->number = number;
    return connection;
}

void queue(struct connection *connection, const char *bytes, size_t size)
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
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
    if (writable)
        event.events |= EPOLLOUT;
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

size_t frame_head(char *head, int opcode, size_t size)
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

void queue_text(struct connection *connection, const char *format, ...)
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

static void message_received(struct connection *connection, int opcode, const char *text,
                             size_t size, uint64_t now)
{
    if (opcode == 9)
        queue_frame(connection, 10, text, size);
    else if (opcode == 8)
        fail("closed by the server: %.*s", size > 2 ? (int)size - 2 : 0, text + 2);
    else if (opcode == 10)
        return;
    else
        text_received(connection, text, size, now);
}

/* Split the bytes at `data`; returns how many of them are done with. */
static size_t take_frames(struct connection *connection, const char *data, size_t size,
                          uint64_t now)
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
        message_received(connection, connection->held[0] & 15, connection->held + head,
                         HEAD_BYTES, now);
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

void open_connection(struct connection *connection, int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    address.sin_port = htons((uint16_t)port);
    connection->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connection->fd < 0)
        fail("socket: %s", strerror(errno));
    if (connect(connection->fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail("connect to port %d: %s", port, strerror(errno));
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

void flush_queued(void)
{
    for (long k = 0; k < dirty_count; k++)
        flush(connections + dirty[k]);
    dirty_count = 0;
}

void poll_file(int file)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, file, &event) < 0)
        fail("epoll_ctl: %s", strerror(errno));
}

bool poll_connections(void)
{
    static struct epoll_event events[1024];
    bool file_is_readable = false;
    int count = epoll_wait(poller, events, 1024, 20);
    if (count < 0 && errno != EINTR)
        fail("epoll_wait: %s", strerror(errno));
    for (int k = 0; k < count; k++) {
        struct connection *connection = events[k].data.ptr;
        if (!connection) {
            file_is_readable = true;
            continue;
        }
        if (events[k].events & EPOLLOUT)
            flush(connection);
        if (events[k].events & ~(uint32_t)EPOLLOUT)
            readable(connection);
    }
    return file_is_readable;
}
