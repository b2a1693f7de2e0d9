/* How long things took: exact below 128 ns, then 64 buckets for each doubling, so within 1.6 %. */
#pragma once
#include <stdint.h>

struct histogram {
    uint64_t total;
    uint64_t counts[64 * 60];
};

void histogram_add(struct histogram *histogram, uint64_t value_ns);

/* The value, in milliseconds, that a part of all is below; 1 is the greatest. 0 without any. */
double histogram_ms(const struct histogram *histogram, double quantile);
