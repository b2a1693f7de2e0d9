/* What every part uses. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NS 1000000000ULL

/* Print a line on standard error and end with exit code 1. */
void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* Zeroed memory; never NULL. */
void *allocate(size_t count, size_t size);

/* CLOCK_MONOTONIC, which all processes of a machine share. */
uint64_t now_ns(void);

bool starts_with(const char *text, size_t size, const char *beginning);

/* The digits at `text`, up to `end` at most; 0 without any. */
uint64_t read_number(const char *text, const char *end);

/* What stands after `key`, or NULL; looked for first at `*where`, where it was the last time. */
const char *after(const char *text, size_t size, const char *key, size_t *where);

/* Write `number` with `width` digits that stand before `end`. */
void put_digits(char *end, uint64_t number, int width);
