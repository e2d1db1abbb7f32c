"""Machine code that runs inside the target: a routine that makes a list of system calls, and its way back.

Position independent, uses no stack and no FPU state, touches nothing but the registers it is given and what they point
at. It is written for the case that nobody watches: whatever the instruction at which the agent dies, the thread goes
on from there and ends with its own registers, signal mask and program counter (design.md, section 4).

Registers while it runs (system calls destroy only rax, rcx and r11):

    r15   block: the thread's own registers and what the way back needs (BLOCK_* offsets)
    r12   control area in the scratch mapping (CONTROL_* offsets); a block of the leader's lies elsewhere
    rbx   next record, rbp  end of the records
    r13   first undo record, r14  end of the undo records; r13 = 0 once they are being done
    rsp   the thread's own, always: a signal that is delivered here finds a good stack

A record is eight words: pointers to the 8-byte cells that hold the call number and the six arguments, then the
result. Because arguments are indirect, a record can take an earlier one's result.

Entry points, and what happens at each:

    map       the call that is set up in the registers (mmap of the scratch mapping); the agent looks at the result
              in a stop right after it. Nobody there: unmap it again, heal.
    unmap     munmap(rdi, rsi), heal.
    heal      block all signals; load registers that survive a system call, flags (popf needs rsp for an instant:
              hence the blocked signals) and rsp; restore the signal mask; load the registers that this call took as
              arguments; jump to the thread's own rip through a stub that loads r15 last.
    batch     make the calls; say so in the control area; wait half a second for the agent, who normally stops the
              thread there; do the undo records; leave through block.leave: to gather, heal or park.
    gather    for the thread that unmaps: wait until all threads whose blocks are in the scratch mapping have read
              their last word of it (their stubs swap r15 with the block's own address), then unmap. After half
              a second leave it mapped: a thread that got no CPU all the while may be using it, and a leak harms
              nobody.
    park      for a skeleton that dies with the agent: wait forever.
    join      for a thread that another one, who unmaps, may or may not be waiting for. It begins at a futex call,
              set up in the registers, that only compares: does the word at rdi, in the thread's block in the scratch
              mapping, hold the ticket (r9)? Then the other thread waits, the mapping stays, and r15 becomes that
              block. Else (also when nothing is mapped there any more) heal, with the block that r15 points at.

The bytes were assembled with GNU as (Intel syntax); the listing is objdump's.
"""

from __future__ import annotations

from typing import Final

# Order of the words of a block; each is 8 bytes.
BLOCK_REGS: Final = (
    "rax", "rcx", "rdx", "rsi", "rdi", "r10", "r11",
    "rbx", "rbp", "r8", "r9", "r12", "r13", "r14", "r15",
    "eflags", "rsp",
)  # fmt: skip
BLOCK_R15: Final = 112
BLOCK_TICKET: Final = 160
BLOCK_BYTES: Final = 176
"""17 registers, then: exit stub, signal mask, all-blocked mask, scratch size or ticket, where to leave to."""
BLOCK_STRIDE: Final = 256
"""From one block in the scratch mapping to the next: none lies in two pages, so one write of it is all or nothing."""

CONTROL_DONE: Final = 0
CONTROL_NR_WORKERS: Final = 8
CONTROL_WORKERS: Final = 16
CONTROL_SCRATCH: Final = 40
CONTROL_BYTES: Final = 64
"""done flag, number of other threads' blocks, address of the first of them, timespec of the wait, scratch mapping."""

RECORD_BYTES: Final = 64
RECORD_RESULT: Final = 56

WAIT_S: Final = 0.5
"""How long `batch` waits for the agent."""

MAP: Final = 0x000
UNMAP: Final = 0x014
HEAL: Final = 0x01B
BATCH: Final = 0x09E
GATHER: Final = 0x12C
PARK: Final = 0x198
JOIN: Final = 0x1CD
_EXIT_TAIL: Final = 0x1E3

CODE: Final = bytes.fromhex(
    # map:
    "0f05"                    # 000 syscall
    "483d01f0ffff"            # 002 cmp rax,0xfffffffffffff001
    "7311"                    # 008 jae heal
    "4889c7"                  # 00a mov rdi,rax
    "498bb7a0000000"          # 00d mov rsi,[r15 + scratch_size]
    # unmap:
    "b80b000000"              # 014 mov eax,0xb
    "0f05"                    # 019 syscall
    # heal:
    "b80e000000"              # 01b mov eax,0xe
    "bf02000000"              # 020 mov edi,0x2
    "498db798000000"          # 025 lea rsi,[r15 + all_blocked]
    "31d2"                    # 02c xor edx,edx
    "41ba08000000"            # 02e mov r10d,0x8
    "0f05"                    # 034 syscall
    "498b5f38"                # 036 mov rbx,[r15 + rbx]
    "498b6f40"                # 03a mov rbp,[r15 + rbp]
    "4d8b4748"                # 03e mov r8,[r15 + r8]
    "4d8b4f50"                # 042 mov r9,[r15 + r9]
    "4d8b6758"                # 046 mov r12,[r15 + r12]
    "4d8b6f60"                # 04a mov r13,[r15 + r13]
    "4d8b7768"                # 04e mov r14,[r15 + r14]
    "498d6778"                # 052 lea rsp,[r15 + flags]
    "9d"                      # 056 popf
    "498ba780000000"          # 057 mov rsp,[r15 + rsp]
    "b80e000000"              # 05e mov eax,0xe
    "bf02000000"              # 063 mov edi,0x2
    "498db790000000"          # 068 lea rsi,[r15 + mask]
    "ba00000000"              # 06f mov edx,0x0
    "41ba08000000"            # 074 mov r10d,0x8
    "0f05"                    # 07a syscall
    "498b07"                  # 07c mov rax,[r15 + rax]
    "498b4f08"                # 07f mov rcx,[r15 + rcx]
    "498b5710"                # 083 mov rdx,[r15 + rdx]
    "498b7718"                # 087 mov rsi,[r15 + rsi]
    "498b7f20"                # 08b mov rdi,[r15 + rdi]
    "4d8b5728"                # 08f mov r10,[r15 + r10]
    "4d8b5f30"                # 093 mov r11,[r15 + r11]
    "41ffa788000000"          # 097 jmp [r15 + exit]
    # batch:
    "4839eb"                  # 09e cmp rbx,rbp
    "733c"                    # 0a1 jae batch_end
    "488b03"                  # 0a3 mov rax,[rbx]
    "488b00"                  # 0a6 mov rax,[rax]
    "488b7b08"                # 0a9 mov rdi,[rbx+0x8]
    "488b3f"                  # 0ad mov rdi,[rdi]
    "488b7310"                # 0b0 mov rsi,[rbx+0x10]
    "488b36"                  # 0b4 mov rsi,[rsi]
    "488b5318"                # 0b7 mov rdx,[rbx+0x18]
    "488b12"                  # 0bb mov rdx,[rdx]
    "4c8b5320"                # 0be mov r10,[rbx+0x20]
    "4d8b12"                  # 0c2 mov r10,[r10]
    "4c8b4328"                # 0c5 mov r8,[rbx+0x28]
    "4d8b00"                  # 0c9 mov r8,[r8]
    "4c8b4b30"                # 0cc mov r9,[rbx+0x30]
    "4d8b09"                  # 0d0 mov r9,[r9]
    "0f05"                    # 0d3 syscall
    "48894338"                # 0d5 mov [rbx+0x38],rax
    "4883c340"                # 0d9 add rbx,0x40
    "ebbf"                    # 0dd jmp batch
    # batch_end:
    "4d85ed"                  # 0df test r13,r13
    "7441"                    # 0e2 je leave
    "49c7042401000000"        # 0e4 mov [r12],0x1
    "49c744241800000000"      # 0ec mov [r12+0x18],0x0
    "49c74424200065cd1d"      # 0f5 mov [r12+0x20],0x1dcd6500
    # call_wait:
    "b80f010000"              # 0fe mov eax,0x10f
    "31ff"                    # 103 xor edi,edi
    "31f6"                    # 105 xor esi,esi
    "498d542418"              # 107 lea rdx,[r12+0x18]
    "4531d2"                  # 10c xor r10d,r10d
    "41b808000000"            # 10f mov r8d,0x8
    "0f05"                    # 115 syscall
    "4c89eb"                  # 117 mov rbx,r13
    "4c89f5"                  # 11a mov rbp,r14
    "4531ed"                  # 11d xor r13d,r13d
    "e979ffffff"              # 120 jmp batch
    # leave:
    "41ffa7a8000000"          # 125 jmp [r15 + leave]
    # gather:
    "bb32000000"              # 12c mov ebx,0x32
    # gather_again:
    "498b4c2408"              # 131 mov rcx,[r12+0x8]
    "498b542410"              # 136 mov rdx,[r12+0x10]
    # gather_next:
    "4885c9"                  # 13b test rcx,rcx
    "7447"                    # 13e je gather_done
    "483b5270"                # 140 cmp rdx,[rdx+0x70]
    "750c"                    # 144 jne gather_wait
    "4881c200010000"          # 146 add rdx,0x100
    "48ffc9"                  # 14d dec rcx
    "ebe9"                    # 150 jmp gather_next
    # gather_wait:
    "ffcb"                    # 152 dec ebx
    "0f88c1feffff"            # 154 js heal
    "49c744241800000000"      # 15a mov [r12+0x18],0x0
    "49c744242080969800"      # 163 mov [r12+0x20],0x989680
    "b80f010000"              # 16c mov eax,0x10f
    "31ff"                    # 171 xor edi,edi
    "31f6"                    # 173 xor esi,esi
    "498d542418"              # 175 lea rdx,[r12+0x18]
    "4531d2"                  # 17a xor r10d,r10d
    "41b808000000"            # 17d mov r8d,0x8
    "0f05"                    # 183 syscall
    "ebaa"                    # 185 jmp gather_again
    # gather_done:
    "498b7c2428"              # 187 mov rdi,[r12+0x28]
    "498bb7a0000000"          # 18c mov rsi,[r15 + scratch_size]
    "e97cfeffff"              # 193 jmp unmap
    # park:
    "49c7042401000000"        # 198 mov [r12],0x1
    "49c744241801000000"      # 1a0 mov [r12+0x18],0x1
    "49c744242000000000"      # 1a9 mov [r12+0x20],0x0
    "b80f010000"              # 1b2 mov eax,0x10f
    "31ff"                    # 1b7 xor edi,edi
    "31f6"                    # 1b9 xor esi,esi
    "498d542418"              # 1bb lea rdx,[r12+0x18]
    "4531d2"                  # 1c0 xor r10d,r10d
    "41b808000000"            # 1c3 mov r8d,0x8
    "0f05"                    # 1c9 syscall
    "ebcb"                    # 1cb jmp park
    # join:
    "0f05"                    # 1cd syscall
    "85c0"                    # 1cf test eax,eax
    "0f8544feffff"            # 1d1 jne heal
    "4c8dbf60ffffff"          # 1d7 lea r15,[rdi - ticket]
    "e9bbfeffff"              # 1de jmp batch
    # exit_tail:
    "4d8b7f70"                # 1e3 mov r15,[r15 + r15]
    "ff2500000000"            # 1e7 jmp [rip+0x0]
    # exit_scratch:
    "4d877f70"                # 1ed xchg [r15 + r15],r15
    "ff2500000000"            # 1f1 jmp [rip+0x0]
)

ROUTINE: Final = CODE[:_EXIT_TAIL]
"""Everything but the stubs."""
EXIT_TAIL: Final = CODE[_EXIT_TAIL : _EXIT_TAIL + 10]
"""Stub, to be followed by the address to go to, for a block in read-only memory."""
EXIT_SCRATCH: Final = CODE[_EXIT_TAIL + 10 :]
"""The same for a block in the scratch mapping: leaves a sign that it was read to the end."""
EXIT_BYTES: Final = 24
"""Room for one stub with its address, aligned."""
