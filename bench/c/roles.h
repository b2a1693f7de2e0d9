/* How many connections are ready: upgraded, joined, registered. */
#pragma once

extern long ready_count;
