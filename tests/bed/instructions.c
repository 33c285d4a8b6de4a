/*
 * A QEMU plugin that counts guest instructions: in all, by function, and at each stage mark of the agent.
 * A mark is an `out` to an I/O port by user mode; nothing else in the guest does that.
 * The few declarations of QEMU's plugin interface (version 1) stand here because Debian has no header for them.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*)(unsigned, void *),
                                            enum qemu_plugin_cb_flags, void *);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
int qemu_plugin_version = 1;

static const uint64_t USER_END = 1ull << 47;
static const uint8_t OUT_DX_AL = 0xee;

/* Translation blocks by address: an open hash table, ample for one boot. */
#define BLOCKS (1u << 20)
static struct { uint64_t address, instructions; } blocks[BLOCKS];
static uint64_t total;
static char out_path[4096];
static FILE *marks;

static uint64_t *counter_of(uint64_t address)
{
    uint32_t slot = address * 0x9e3779b97f4a7c15ull >> 44;
    while (blocks[slot].address && blocks[slot].address != address)
        slot = (slot + 1) % BLOCKS;
    blocks[slot].address = address;
    return &blocks[slot].instructions;
}

static void on_mark(unsigned cpu, void *unused)
{
    fprintf(marks, "%lu\n", total);
    fflush(marks);
}

static void on_translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    uint64_t address = qemu_plugin_tb_vaddr(tb);
    size_t count = qemu_plugin_tb_n_insns(tb);
    qemu_plugin_register_vcpu_tb_exec_inline(tb, QEMU_PLUGIN_INLINE_ADD_U64, &total, count);
    qemu_plugin_register_vcpu_tb_exec_inline(tb, QEMU_PLUGIN_INLINE_ADD_U64, counter_of(address), count);
    for (size_t i = 0; address < USER_END && i < count; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        if (*(const uint8_t *)qemu_plugin_insn_data(insn) == OUT_DX_AL)
            qemu_plugin_register_vcpu_insn_exec_cb(insn, on_mark, QEMU_PLUGIN_CB_NO_REGS, NULL);
    }
}

static void on_exit_of_qemu(qemu_plugin_id_t id, void *unused)
{
    FILE *out = fopen(out_path, "w");
    for (size_t i = 0; out && i < BLOCKS; i++)
        if (blocks[i].instructions)
            fprintf(out, "%016lx %lu\n", blocks[i].address, blocks[i].instructions);
    if (out)
        fclose(out);
}

/* Argument out=PATH: counts by block go to PATH, totals at the marks to PATH.marks. */
int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    char path[sizeof out_path + 8];
    if (argc != 1 || strncmp(argv[0], "out=", 4))
        return -1;
    snprintf(out_path, sizeof out_path, "%s", argv[0] + 4);
    snprintf(path, sizeof path, "%s.marks", out_path);
    marks = fopen(path, "w");
    if (!marks)
        return -1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
    qemu_plugin_register_atexit_cb(id, on_exit_of_qemu, NULL);
    return 0;
}
