// What the tests set and read, and where the emulator asks for it (control.cpp).
#pragma once

#include "simt.h"

namespace fflfast::simt::emulator {

uint64_t draw();  // the next number of the seeded sequence
void begin_launch(const void* kernel);
void end_launch(const Launch& launch, int64_t switches);
bool is_skipped(int site);  // by the kernel that runs
int resident_clusters();

}  // namespace fflfast::simt::emulator
