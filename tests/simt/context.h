// Switching between stacks. ucontext makes a system call per switch to keep the signal mask, which kernels do not need:
// on x86-64 the registers that a call preserves are all there is to save.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(FFLFAST_SIMT_UCONTEXT)

extern "C" void fflfast_simt_switch(void** save, void* resume);
asm(R"(
.text
.globl fflfast_simt_switch
.hidden fflfast_simt_switch
.type fflfast_simt_switch, @function
fflfast_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fflfast_simt_switch, .-fflfast_simt_switch
)");

namespace fflfast::simt::emulator {

struct Context {
  void* top = nullptr;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    constexpr int kSaved = 6;
    auto* slot = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
    *--slot = 0;  // where a return address would stand: at its entry a function expects the stack 8 off 16
    *--slot = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < kSaved; ++i) *--slot = 0;
    top = slot;
  }

  static void change(Context& from, Context& to) { fflfast_simt_switch(&from.top, to.top); }
};

}  // namespace fflfast::simt::emulator

#else

#include <ucontext.h>

namespace fflfast::simt::emulator {

struct Context {
  ucontext_t registers;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&registers);
    registers.uc_stack.ss_sp = stack;
    registers.uc_stack.ss_size = bytes;
    registers.uc_link = nullptr;
    makecontext(&registers, entry, 0);
  }

  static void change(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
};

}  // namespace fflfast::simt::emulator

#endif
