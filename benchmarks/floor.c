/* What a guest costs at the least: the messages that make one, and no program around them.
 *
 *   floor create FIRST COUNT FOLDER FILTERS   a veth into each namespace FOLDER/f<number>, made where it is not there
 *   floor delete FIRST COUNT FOLDER NAMES     the devices, many by one group; with NAMES 1 the namespaces too
 *
 * A guest is two rtnetlink sends (host, guest) and one nfnetlink batch: a veth with its far end in place, one queue,
 * route_localnet and a /30 on both ends, in the guest also lo shrunk to /16 and a default route, and one element of
 * the set `guests` of table `floor`, which has to be there. FILTERS 1: three messages more, for a clsact hook and two
 * filters. Exit code 1 and errno's words for whatever the kernel refuses. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/if_link.h>
#include <linux/ip.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>
#include <linux/pkt_cls.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <linux/veth.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

enum { LO = 1, FIRST_INDEX = 500000, DOOMED = 77777, LAST = 1 };

static char buffer[1 << 18];
static size_t used;
static struct nlmsghdr *message;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void *put(const void *data, size_t size) {
    void *place = buffer + used;
    if (used + NLMSG_ALIGN(size) > sizeof buffer) {
        errno = ENOBUFS;
        fail("message");
    }
    memset(place, 0, NLMSG_ALIGN(size));
    if (data)
        memcpy(place, data, size);
    used += NLMSG_ALIGN(size);
    if (message)
        message->nlmsg_len = buffer + used - (char *)message;
    return place;
}

static void begin(int type, int flags, const void *header, size_t size) {
    struct nlmsghdr start = {.nlmsg_len = sizeof start, .nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | flags};
    message = NULL;
    message = put(&start, sizeof start);
    put(header, size);
}

static struct rtattr *attribute(int type, const void *data, size_t size) {
    struct rtattr start = {.rta_type = type, .rta_len = sizeof start + size}, *one = put(&start, sizeof start);
    if (size)
        put(data, size);
    return one;
}

static struct rtattr *nest(int type) { return attribute(type | NLA_F_NESTED, NULL, 0); }

static void end(struct rtattr *one) { one->rta_len = buffer + used - (char *)one; }

static void number(int type, uint32_t value) { attribute(type, &value, sizeof value); }

static void string(int type, const char *value) { attribute(type, value, strlen(value) + 1); }

/* Send what is in the buffer. The last message asks for an acknowledgement, refusals of the others come in any case. */
static void flush(int handle, const char *what) {
    static char answer[1 << 16];
    if (send(handle, buffer, used, 0) < 0)
        fail(what);
    for (int acknowledged = 0; !acknowledged;) {
        int size = recv(handle, answer, sizeof answer, 0);
        if (size < 0)
            fail(what);
        for (struct nlmsghdr *one = (void *)answer; NLMSG_OK(one, size); one = NLMSG_NEXT(one, size)) {
            struct nlmsgerr *error = NLMSG_DATA(one);
            if (one->nlmsg_type != NLMSG_ERROR)
                continue;
            if (error->error) {
                errno = -error->error;
                fail(what);
            }
            acknowledged |= one->nlmsg_seq == LAST;
        }
    }
    used = 0;
}

static void finish(int handle, const char *what) {
    message->nlmsg_flags |= NLM_F_ACK;
    message->nlmsg_seq = LAST;
    flush(handle, what);
}

static int open_netlink(int protocol) {
    int handle = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    if (handle < 0)
        fail("socket");
    return handle;
}

static uint32_t gateway_of(int guest) { return 0x7f010001 + 4 * (uint32_t)guest; }

static void begin_link(int type, int flags, int index, int up) {
    struct ifinfomsg header = {.ifi_index = index, .ifi_flags = up ? IFF_UP : 0, .ifi_change = up ? IFF_UP : 0};
    begin(type, flags, &header, sizeof header);
}

static void describe_end(const char *name, uint32_t address) {
    uint8_t mac[6] = {2, 0x66, address >> 24, address >> 16, address >> 8, address};
    string(IFLA_IFNAME, name);
    attribute(IFLA_ADDRESS, mac, sizeof mac);
    number(IFLA_MTU, 1500);
    number(IFLA_NUM_TX_QUEUES, 1);
    number(IFLA_NUM_RX_QUEUES, 1);
}

static void put_route_localnet(int index) {
    begin_link(RTM_SETLINK, 0, index, 0);
    struct rtattr *families = nest(IFLA_AF_SPEC), *family = nest(AF_INET), *values = nest(IFLA_INET_CONF);
    number(IPV4_DEVCONF_ROUTE_LOCALNET, 1);
    end(values), end(family), end(families);
}

static void put_address(int type, int index, uint32_t address, int length, int scope) {
    struct ifaddrmsg header = {.ifa_family = AF_INET, .ifa_prefixlen = length, .ifa_scope = scope, .ifa_index = index};
    address = htonl(address);
    begin(type, type == RTM_NEWADDR ? NLM_F_CREATE | NLM_F_EXCL : 0, &header, sizeof header);
    attribute(IFA_LOCAL, &address, sizeof address);
    attribute(IFA_ADDRESS, &address, sizeof address);
}

static void put_filter(int index, int hook) {
    static const struct sock_filter program[] = {
        {BPF_LD | BPF_H | BPF_ABS, 0, 0, 12}, {BPF_JMP | BPF_JEQ, 0, 5, 0x0800},
        {BPF_LD | BPF_W | BPF_ABS, 0, 0, 26}, {BPF_JMP | BPF_JEQ, 0, 3, 0x7f010002},
        {BPF_LD | BPF_W | BPF_ABS, 0, 0, 30}, {BPF_JMP | BPF_JEQ, 1, 0, 0xffffffff},
        {BPF_RET, 0, 0, 0xffffffff},          {BPF_RET, 0, 0, 2},
    };
    const uint16_t length = sizeof program / sizeof *program;
    struct tcmsg place = {.tcm_ifindex = index, .tcm_handle = 1, .tcm_info = 1 << 16 | htons(3)};
    place.tcm_parent = TC_H_MAKE(TC_H_CLSACT, hook);
    begin(RTM_NEWTFILTER, NLM_F_CREATE, &place, sizeof place);
    string(TCA_KIND, "bpf");
    struct rtattr *options = nest(TCA_OPTIONS);
    attribute(TCA_BPF_OPS_LEN, &length, sizeof length);
    attribute(TCA_BPF_OPS, program, sizeof program);
    number(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT);
    end(options);
}

static void make_host_side(int rtnetlink, int guest, int namespace, int filters) {
    const int index = FIRST_INDEX + 2 * guest;
    char name[IFNAMSIZ];
    snprintf(name, sizeof name, "flr-%d", guest);
    begin_link(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, index, 1);
    describe_end(name, gateway_of(guest));
    struct rtattr *info = nest(IFLA_LINKINFO);
    string(IFLA_INFO_KIND, "veth");
    struct rtattr *data = nest(IFLA_INFO_DATA), *peer = nest(VETH_INFO_PEER);
    struct ifinfomsg header = {.ifi_index = index + 1};
    put(&header, sizeof header);
    describe_end("eth0", gateway_of(guest) + 1);
    number(IFLA_NET_NS_FD, namespace);
    end(peer), end(data), end(info);
    put_route_localnet(index);
    if (filters) {
        struct tcmsg hook = {.tcm_ifindex = index, .tcm_handle = TC_H_MAKE(TC_H_CLSACT, 0), .tcm_parent = TC_H_CLSACT};
        begin(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &hook, sizeof hook);
        string(TCA_KIND, "clsact");
        put_filter(index, TC_H_MIN_INGRESS);
        put_filter(index, TC_H_MIN_EGRESS);
    }
    put_address(RTM_NEWADDR, index, gateway_of(guest), 30, RT_SCOPE_UNIVERSE);
    finish(rtnetlink, "host side");
}

static void make_guest_side(int rtnetlink, int guest) {
    const int index = FIRST_INDEX + 2 * guest + 1;
    const uint32_t gateway = htonl(gateway_of(guest));
    begin_link(RTM_SETLINK, 0, LO, 1);
    put_address(RTM_NEWADDR, LO, 0x7f000001, 16, RT_SCOPE_HOST);
    put_address(RTM_DELADDR, LO, 0x7f000001, 8, RT_SCOPE_HOST);
    put_route_localnet(index);
    put_address(RTM_NEWADDR, index, gateway_of(guest) + 1, 30, RT_SCOPE_UNIVERSE);
    begin_link(RTM_SETLINK, 0, index, 1);
    struct rtmsg route = {.rtm_family = AF_INET, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_STATIC};
    route.rtm_type = RTN_UNICAST;
    begin(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &route, sizeof route);
    attribute(RTA_GATEWAY, &gateway, sizeof gateway);
    number(RTA_OIF, index);
    finish(rtnetlink, "guest side");
}

static void change_set(int nfnetlink, int type, int first, int count) {
    const struct nfgenmsg batch = {.version = NFNETLINK_V0, .res_id = htons(NFNL_SUBSYS_NFTABLES)};
    const struct nfgenmsg family = {.nfgen_family = AF_INET, .version = NFNETLINK_V0};
    begin(NFNL_MSG_BATCH_BEGIN, 0, &batch, sizeof batch);
    begin(NFNL_SUBSYS_NFTABLES << 8 | type, NLM_F_CREATE | NLM_F_ACK, &family, sizeof family);
    message->nlmsg_seq = LAST;
    string(NFTA_SET_ELEM_LIST_TABLE, "floor");
    string(NFTA_SET_ELEM_LIST_SET, "guests");
    struct rtattr *elements = nest(NFTA_SET_ELEM_LIST_ELEMENTS);
    for (int guest = first; guest < first + count; guest++) {
        const uint32_t address = htonl(gateway_of(guest) + 1);
        struct rtattr *element = nest(NFTA_LIST_ELEM), *key = nest(NFTA_SET_ELEM_KEY);
        attribute(NFTA_DATA_VALUE, &address, sizeof address);
        end(key), end(element);
    }
    end(elements);
    begin(NFNL_MSG_BATCH_END, 0, &batch, sizeof batch);
    flush(nfnetlink, "set");
}

/* Return a descriptor of the namespace at `path`, made where it is not there, and leave the caller inside of it. */
static int enter(const char *path) {
    int namespace = open(path, O_RDONLY | O_CLOEXEC);
    if (namespace >= 0) {
        if (setns(namespace, CLONE_NEWNET))
            fail(path);
        return namespace;
    }
    if (unshare(CLONE_NEWNET))
        fail("unshare");
    int file = open(path, O_RDONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
    if (file < 0 || mount("/proc/self/ns/net", path, NULL, MS_BIND, NULL))
        fail(path);
    close(file);
    return open(path, O_RDONLY | O_CLOEXEC);
}

static void create(int first, int count, const char *folder, int filters) {
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    int host = open_netlink(NETLINK_ROUTE), nfnetlink = open_netlink(NETLINK_NETFILTER);
    for (int guest = first; guest < first + count; guest++) {
        char path[256];
        snprintf(path, sizeof path, "%s/f%d", folder, guest);
        int namespace = enter(path), inside = open_netlink(NETLINK_ROUTE);
        if (setns(home, CLONE_NEWNET))
            fail("setns");
        make_host_side(host, guest, namespace, filters);
        make_guest_side(inside, guest);
        change_set(nfnetlink, NFT_MSG_NEWSETELEM, guest, 1);
        close(inside);
        close(namespace);
    }
}

static void delete(int first, int count, const char *folder, int names) {
    int host = open_netlink(NETLINK_ROUTE);
    if (count > 1) {
        for (int guest = first; guest < first + count; guest++) {
            begin_link(RTM_SETLINK, 0, FIRST_INDEX + 2 * guest, 0);
            number(IFLA_GROUP, DOOMED);
        }
        finish(host, "group");
        begin_link(RTM_DELLINK, 0, 0, 0);
        number(IFLA_GROUP, DOOMED);
    } else {
        begin_link(RTM_DELLINK, 0, FIRST_INDEX + 2 * first, 0);
    }
    finish(host, "delete");
    change_set(open_netlink(NETLINK_NETFILTER), NFT_MSG_DELSETELEM, first, count);
    for (int guest = first; names && guest < first + count; guest++) {
        char path[256];
        snprintf(path, sizeof path, "%s/f%d", folder, guest);
        if (umount2(path, MNT_DETACH) || unlink(path))
            fail(path);
    }
}

int main(int argc, char **argv) {
    if (argc != 6) {
        fprintf(stderr, "floor create|delete FIRST COUNT FOLDER FLAG\n");
        return 2;
    }
    (*argv[1] == 'c' ? create : delete)(atoi(argv[2]), atoi(argv[3]), argv[4], atoi(argv[5]));
    return 0;
}
