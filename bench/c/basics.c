#define _GNU_SOURCE
#include "basics.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS + (uint64_t)now.tv_nsec;
}

void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        fail("out of memory");
    return memory;
}

bool starts_with(const char *text, size_t size, const char *beginning)
{
    size_t length = strlen(beginning);
    return size >= length && memcmp(text, beginning, length) == 0;
}

uint64_t read_number(const char *text, const char *end)
{
    uint64_t number = 0;
    while (text < end && *text >= '0' && *text <= '9')
        number = number * 10 + (uint64_t)(*text++ - '0');
    return number;
}

const char *after(const char *text, size_t size, const char *key, size_t *where)
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

void put_digits(char *end, uint64_t number, int width)
{
    while (width-- > 0) {
        *--end = (char)('0' + number % 10);
        number /= 10;
    }
}
